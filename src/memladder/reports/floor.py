"""The engine's cells against their floor: what a process takes, and what it may."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memladder import formats, models
from memladder.core.record import PhaseUse, Record, Run
from memladder.core.units import MIB, mib
from memladder.engine.program.floor import Floor, floor
from memladder.models import LayerConfig

# Whose rows have the engine's floor: by the beginning of their keys.
_ENGINES = ("ladder", "welder")
_COLUMNS = {
    "cpu": "case weights activations floor bound grown_by over_the_floor holds",
    "cuda": "case context weights activations floor bound steady over_context_and_floor "
    "load_peak holds",
}
# What loading may take beyond the steady state, on CUDA.
_LOADING = 64 * MIB
_LOADING_PHASES = ("weights", "compile", "first run")


@dataclass(frozen=True)
class FloorRow:
    """One measured case of the engine; bytes.

    On the CPU `used` is what the process has grown by after its imports. On CUDA it is all of the
    process, `context` what it had taken before it loaded anything, and `load_peak` the most that it
    took from then on until its steady state.
    """

    id: str
    floor: Floor
    used: int
    context: int | None = None
    load_peak: int | None = None

    @property
    def bound(self) -> int:
        """What `used` may be."""
        if self.context is None:
            return self.floor.host_bound
        return self.floor.device_bound(self.context)

    @property
    def holds(self) -> bool:
        """Does it take no more than it may, also while it loads?"""
        peak = self.load_peak or 0
        return self.used <= self.bound and peak <= self.used + _LOADING


def rows(records: Iterable[Record], device: str = "cpu") -> tuple[FloorRow, ...]:
    """The measured cases of the engine on `cpu` or `cuda`, in the records' order."""
    return tuple(
        _row(record)
        for record in records
        if record.runs
        # A layer of ours, without a past: nothing else has a least in closed form.
        and record.case.model in models.names()
        and not (record.case.whole or record.case.shape.past)
        and record.case.device.partition(":")[0] == device
        and record.case.framework.partition("_")[0] in _ENGINES
    )


def to_markdown(table: Iterable[FloorRow]) -> str:
    """A GitHub table, in MiB. All rows are of one kind of device."""
    table = tuple(table)
    on_cuda = any(row.context is not None for row in table)
    columns = _COLUMNS["cuda" if on_cuda else "cpu"].split()
    header = " | ".join(name.replace("_", " ") for name in columns)
    lines = [f"| {header} |", "|---" + "|---:" * (len(columns) - 2) + "|---|"]
    for row in table:
        floor_ = row.floor.nbytes
        sizes = [row.floor.weights, row.floor.activations, floor_, row.bound, row.used]
        if row.context is None or row.load_peak is None:
            sizes += [row.used - floor_]
        else:
            sizes = [row.context, *sizes, row.used - row.context - floor_, row.load_peak]
        numbers = " | ".join(f"{mib(size):.1f}" for size in sizes)
        lines.append(f"| {row.id} | {numbers} | {'yes' if row.holds else 'NO'} |")
    return "\n".join(lines) + "\n"


def _row(record: Record) -> FloorRow:
    assert record.layer is not None
    config = LayerConfig(record.case.model, record.layer.config)
    kind = formats.get(str(record.settings["weight_format"]))
    least = floor(config, record.case.shape, kind)
    if record.case.device == "cpu":
        return FloorRow(record.case.id, least, _median(record, _growth))
    return FloorRow(
        record.case.id,
        least,
        _median(record, lambda run: run.steady_bytes),
        _median(record, lambda run: _phase(run, "context").end_bytes),
        _median(record, _load_peak),
    )


def _median(record: Record, read: Callable[[Run], int]) -> int:
    return round(statistics.median(map(read, record.runs)))


def _phase(run: Run, name: str) -> PhaseUse:
    return next(phase for phase in run.phases if phase.name == name)


def _load_peak(run: Run) -> int:
    return max(_phase(run, name).peak_bytes for name in _LOADING_PHASES)


def _growth(run: Run) -> int:
    """The steady phase's largest reading above the first phase's last one: all libraries are
    imported there, and nothing is loaded."""
    return run.steady_bytes - run.phases[0].end_bytes
