"""The engine's cells against their floor: what a process has grown by, and what it may."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from memladder import formats
from memladder.engine.floor import Floor, floor
from memladder.measure.record import Record, Run
from memladder.models import LayerConfig
from memladder.units import mib

_COLUMNS = (
    "case",
    "weights",
    "activations",
    "floor",
    "bound",
    "grown by",
    "over the floor",
    "holds",
)


@dataclass(frozen=True)
class FloorRow:
    """One measured case of the engine on the CPU; bytes."""

    id: str
    floor: Floor
    growth: int

    @property
    def holds(self) -> bool:
        """Has the process grown by no more than it may?"""
        return self.growth <= self.floor.host_bound


def rows(records: Iterable[Record]) -> tuple[FloorRow, ...]:
    """The measured cases of the engine on the CPU, in the records' order."""
    return tuple(
        _row(record)
        for record in records
        if record.runs and record.case.device == "cpu" and "weight_format" in record.settings
    )


def to_markdown(table: Iterable[FloorRow]) -> str:
    """A GitHub table, in MiB."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" + "|---:" * 6 + "|---|"]
    for row in table:
        sizes = (
            row.floor.weights,
            row.floor.activations,
            row.floor.nbytes,
            row.floor.host_bound,
            row.growth,
            row.growth - row.floor.nbytes,
        )
        numbers = " | ".join(f"{mib(size):.1f}" for size in sizes)
        lines.append(f"| {row.id} | {numbers} | {'yes' if row.holds else 'NO'} |")
    return "\n".join(lines) + "\n"


def _row(record: Record) -> FloorRow:
    assert record.layer is not None
    config = LayerConfig(record.case.model, record.layer.config)
    kind = formats.get(str(record.settings["weight_format"]))
    growth = round(statistics.median(map(_growth, record.runs)))
    return FloorRow(record.case.id, floor(config, record.case.shape, kind), growth)


def _growth(run: Run) -> int:
    """The steady phase's largest reading above the first phase's last one: all libraries are
    imported there, and nothing is loaded."""
    return run.steady_bytes - run.phases[0].end_bytes
