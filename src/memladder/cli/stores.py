"""Records that commands read."""

from __future__ import annotations

from pathlib import Path

from memladder.cli.ending import say
from memladder.core.errors import UsageError
from memladder.core.record import Record, Status
from memladder.sweeps import store


def read_store(path: Path) -> store.Contents:
    """What is in a store; what can't be read is warned of."""
    contents = store.read(path)
    for line in contents.complaints():
        left_out(line)
    return contents


def left_out(line: str) -> None:
    """Warn of what could not be used."""
    say(f"warning: {line}; left out")


def measured(path: Path, case: str | None) -> list[Record]:
    """The measured records in a store. Raises UsageError where there is none."""
    contents = store.read(path)
    found = [r for r in contents.records if r.status is Status.MEASURED]
    if case is not None:
        found = [record for record in found if record.case.id == case]
    if not found:
        others = f" of {case}" if case else ""
        raise UsageError(f"{path}: no measured record{others} in {len(contents.records)} records")
    return found
