"""`memladder diff`: what changed between two records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from memladder.cli.console import mib_text, plain_console, print_json
from memladder.cli.options import AsJson
from memladder.cli.stores import measured
from memladder.core.errors import UsageError
from memladder.core.record import Record


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A record, or STORE:CASE.")],
    after: Annotated[str, typer.Argument(metavar="B")],
    as_json: AsJson = False,
) -> None:
    """Tell what changed between two records, by category, the largest first."""
    from memladder.accounting import diff as differing
    from memladder.core.serial import to_json

    one, two = _single(before), _single(after)
    found = differing.diff(one, two)
    if as_json:
        print_json({**to_json(found), "sentence": found.sentence})
        return
    console = plain_console()
    console.print(found.sentence)
    table = Table("category", "A, MiB", "B, MiB", "change", "why", box=None)
    for index in (1, 2, 3):
        table.columns[index].justify = "right"
    for change in (*found.changes, found.total):
        sizes = (
            mib_text(change.before),
            mib_text(change.after),
            f"{change.nbytes / (1 << 20):+,.1f}",
        )
        table.add_row(change.category, *sizes, change.why or "")
    console.print(table)
    for line in found.told:
        console.print(line)


def _single(text: str) -> Record:
    """The one record of a file, or of a store's case: `results/h100.json:llama_pytorch_1_1`."""
    path, case = Path(text), None
    if not path.exists() and ":" in text:
        name, _, case = text.rpartition(":")
        path = Path(name)
    found = measured(path, case)
    if len(found) > 1:
        raise UsageError(f"{text[:80]} holds {len(found)} records; diff takes one: STORE:CASE")
    return found[0]
