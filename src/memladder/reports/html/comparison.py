"""Two stores side by side: cells of both, what changed by category, and whether that is noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memladder.accounting import split
from memladder.core.record import Record
from memladder.core.units import MIB

# The driver hands out pages of this size: a change of one is none.
_PAGE = 2 * MIB
# Of a process on the CPU, whose pages the system shares out: repeats differ by so much.
_HOST_SHARE = 0.01


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[dict[str, Any]]:
    """The measured cells that both have, the largest difference first."""
    later = {record.case.id: record for record in after if record.runs}
    pairs = [(one, later[one.case.id]) for one in before if one.runs and one.case.id in later]
    found = [_pair(one, two) for one, two in pairs]
    return sorted(found, key=lambda item: -abs(item["after"] - item["before"]))


def verdict(before: Record, after: Record) -> str:
    """Whether the difference of two measured cells can be told from noise.

    `same`: at most a page of the driver's, or 1 % of a process on the CPU. `noise`: no more than
    the repeats of either differ among themselves. `once`: more than a page, but a case ran only
    once, so that its noise is not known. `change`: more than its repeats differ.
    """
    one, two = (record.steady_bytes or 0 for record in (before, after))
    difference = abs(two - one)
    on_host = "cpu" in (before.case.device, after.case.device)
    if difference <= (max(_PAGE, round(_HOST_SHARE * one)) if on_host else _PAGE):
        return "same"
    spreads = [_spread(record) for record in (before, after)]
    known = [spread for spread in spreads if spread is not None]
    if difference <= sum(known):
        return "noise"
    return "change" if len(known) == len(spreads) else "once"


def _spread(record: Record) -> int | None:
    sizes = [run.steady_bytes for run in record.runs]
    return max(sizes) - min(sizes) if len(sizes) > 1 else None


def _pair(before: Record, after: Record) -> dict[str, Any]:
    one, two = split.ledger(before), split.ledger(after)
    names = dict.fromkeys(entry.category for entry in (*one.entries, *two.entries))
    changes = [[name, two.nbytes(name) - one.nbytes(name)] for name in names]
    changes = [change for change in changes if change[1]]
    return {
        "id": before.case.id,
        "before": before.steady_bytes,
        "after": after.steady_bytes,
        "verdict": verdict(before, after),
        "changes": sorted(changes, key=lambda change: -abs(int(change[1]))),
    }
