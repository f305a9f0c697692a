"""`memladder report`: one page of records that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.cli.ending import say
from memladder.core.errors import UsageError


def report(
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE …", help="Folders or results files; two are compared."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH",
            help="What the form asks about: llama, bloom, a config.json; may be repeated.",
        ),
    ] = None,
) -> None:
    """Write one self-contained page: figure, ledgers, comparison, table, what fits."""
    from memladder.paper import page
    from memladder.paper.rows import MODELS

    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{out}: a page's name ends in .html")
    made = page.report(
        stores,
        out,
        models=model or tuple(MODELS),
        on_bad=lambda line: say(f"warning: {line}; left out"),
    )
    print(f"{made}, {made.stat().st_size:,} bytes")
