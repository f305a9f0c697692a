"""`memladder show`: one record, explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.cli.console import plain_console
from memladder.core.errors import UsageError
from memladder.sweeps import store


def show(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="A record's JSON file.")],
) -> None:
    """Explain one record: phases, settings, quality."""
    from memladder.reports import show as showing

    contents = store.read(record)
    if record.is_dir() or len(contents.records) != 1:
        raise UsageError(f"{record} is not one record; `memladder table {record}` prints many")
    showing.print_record(contents.records[0], plain_console())
