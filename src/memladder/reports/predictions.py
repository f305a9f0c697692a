"""Predicted against measured, as a page of Markdown: in total, by row, by category."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from memladder.accounting import split
from memladder.core.ledger import CATEGORIES, Known
from memladder.core.record import Record
from memladder.core.units import MIB
from memladder.predictor.evidence import Compared, Score, score


def table(records: Sequence[Record], compared: Sequence[Compared], digest: str | None) -> str:
    """All of it. `digest` is the sealed file's; None where predictions were made afterwards."""
    said = (
        f"Predictions were sealed before the cells were measured: SHA-256 `{digest}`."
        if digest
        else "Predictions were made after the cells were measured: no error here is a held-out one."
    )
    parts = [said, _totals(compared), _categories(records, compared), _cells(compared)]
    return "\n\n".join(part for part in parts if part)


def _totals(compared: Sequence[Compared]) -> str:
    rows = ["| row | cells | median | 95th percentile | largest | within the interval |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    keys = sorted({_key(cell) for cell in compared})
    for key in keys:
        found = score([cell for cell in compared if _key(cell) == key])
        if found is not None:
            rows.append(_scored(key, found))
    everything = score(compared)
    if everything is not None:
        rows.append(_scored("all", everything))
    return "\n".join(rows)


def _key(cell: Compared) -> str:
    return cell.prediction.framework if cell.prediction else ""


def _scored(name: str, found: Score) -> str:
    errors = " | ".join(f"{100 * e:.2f} %" for e in (found.median, found.p95, found.largest))
    return f"| {name} | {found.cells} | {errors} | {found.within} of {found.cells} |"


def _categories(records: Sequence[Record], compared: Sequence[Compared]) -> str:
    """Only what a record's framework told or read: what was derived would agree with itself."""
    differences: dict[str, list[int]] = {}
    by_id = {(cell.id, cell.device): cell for cell in compared}
    for record in records:
        device = record.environment.machine.device if record.case.device != "cpu" else "cpu"
        cell = by_id.get((record.case.id, device))
        if cell is None or cell.prediction is None:
            continue
        for entry in split.ledger(record).entries:
            if entry.known in (Known.TOLD, Known.DIFFERENCE):
                predicted = cell.prediction.ledger.nbytes(entry.category)
                if entry.category == "weights":
                    predicted += cell.prediction.ledger.nbytes("scales")
                differences.setdefault(entry.category, []).append(predicted - entry.nbytes)
    rows = ["| category | cells | median difference, MiB | largest |", "|---|---:|---:|---:|"]
    for name in CATEGORIES:
        found = differences.get(name)
        if found:
            middle = statistics.median(found) / MIB
            largest = max(found, key=abs) / MIB
            rows.append(f"| {name} | {len(found)} | {middle:+.1f} | {largest:+.1f} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _cells(compared: Sequence[Compared]) -> str:
    rows = ["| case | device | measured, MiB | predicted | error |", "|---|---|---:|---:|---:|"]
    for cell in compared:
        measured = f"{cell.measured_bytes / MIB:,.0f}"
        if cell.prediction is None or cell.error is None:
            rows.append(f"| {cell.id} | {cell.device} | {measured} | {cell.reason} | |")
            continue
        predicted = f"{cell.prediction.total_bytes / MIB:,.0f}"
        mark = "" if cell.within else " outside its interval"
        row = f"| {cell.id} | {cell.device} | {measured} | {predicted} | {100 * cell.error:+.2f} %"
        rows.append(f"{row}{mark} |")
    return "\n".join(rows)
