"""`memladder table`: a row for every case."""

from __future__ import annotations

from typing import Annotated

import typer

from memladder.cli.drawing import custom
from memladder.cli.options import StorePath
from memladder.cli.stores import read_store
from memladder.core.errors import UsageError


def table(
    store: StorePath,
    form: Annotated[str, typer.Option("--format", metavar="md|csv|json")] = "md",
) -> None:
    """Print a row for every case in STORE."""
    from memladder.paper.published import published
    from memladder.reports import table as tables

    writers = {"md": tables.to_markdown, "csv": tables.to_csv, "json": tables.to_json}
    if form not in writers:
        raise UsageError(f"format {form!r} is not one of {', '.join(writers)}")
    found = read_store(store)
    known = {} if custom(found.records) else published().values
    print(writers[form](tables.rows(found.records, known, found.verifications)), end="")
