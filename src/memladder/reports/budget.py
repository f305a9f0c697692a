"""The engine's cells against their budget: what a process takes, and what it may."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memladder import formats
from memladder.core.errors import MemladderError, RecordError
from memladder.core.record import Record, Run
from memladder.core.units import MIB, mib
from memladder.engine.program.budget import Budget, budget
from memladder.models import LayerConfig

# Whose rows have the engine's budget: by the beginning of their keys.
_ENGINES = ("ladder", "welder")
_COLUMNS = {
    "cpu": "case weights activations budget bound grown_by over_the_budget holds",
    "cuda": "case context weights activations budget bound steady over_context_and_budget "
    "load_peak holds",
}
# What loading may take beyond the steady state, on CUDA.
_LOADING = 64 * MIB
_LOADING_PHASES = ("weights", "compile", "first run")


@dataclass(frozen=True)
class BudgetRow:
    """One measured case of the engine; bytes.

    On the CPU `used` is what the process has grown by after its imports. On CUDA it is all of the
    process, `context` what it had taken before it loaded anything, and `load_peak` the most that it
    took from then on until its steady state.
    """

    id: str
    budget: Budget
    used: int
    context: int | None = None
    load_peak: int | None = None

    @property
    def bound(self) -> int:
        """What `used` may be."""
        if self.context is None:
            return self.budget.host_bound
        return self.budget.device_bound(self.context)

    @property
    def holds(self) -> bool:
        """Does it take no more than it may, also while it loads?"""
        peak = self.load_peak or 0
        return self.used <= self.bound and peak <= self.used + _LOADING


def rows(
    records: Iterable[Record], device: str = "cpu", on_bad: Callable[[str], None] | None = None
) -> tuple[BudgetRow, ...]:
    """The measured cases of the engine on `cpu` or `cuda`, in the records' order.

    A record that lacks what its budget is computed from goes to `on_bad` as a line; without it,
    RecordError is raised.
    """
    found = []
    for record in records:
        is_ours = record.case.framework.partition("_")[0] in _ENGINES
        if record.runs and is_ours and record.case.device.partition(":")[0] == device:
            try:
                found.append(_row(record))
            except RecordError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
    return tuple(found)


def to_markdown(table: Iterable[BudgetRow]) -> str:
    """A GitHub table, in MiB. All rows are of one kind of device."""
    table = tuple(table)
    on_cuda = any(row.context is not None for row in table)
    columns = _COLUMNS["cuda" if on_cuda else "cpu"].split()
    header = " | ".join(name.replace("_", " ") for name in columns)
    lines = [f"| {header} |", "|---" + "|---:" * (len(columns) - 2) + "|---|"]
    for row in table:
        budget_ = row.budget.nbytes
        sizes = [row.budget.weights, row.budget.activations, budget_, row.bound, row.used]
        if row.context is None or row.load_peak is None:
            sizes += [row.used - budget_]
        else:
            sizes = [row.context, *sizes, row.used - row.context - budget_, row.load_peak]
        numbers = " | ".join(f"{mib(size):.1f}" for size in sizes)
        lines.append(f"| {row.id} | {numbers} | {'yes' if row.holds else 'NO'} |")
    return "\n".join(lines) + "\n"


def _row(record: Record) -> BudgetRow:
    given = _budget(record)
    if record.case.device == "cpu":
        return BudgetRow(record.case.id, given, _median(record, _growth))
    return BudgetRow(
        record.case.id,
        given,
        _median(record, lambda run: run.steady_bytes),
        _median(record, lambda run: run.phase("context").end_bytes),
        _median(record, _load_peak),
    )


def _budget(record: Record) -> Budget:
    """Raises RecordError where the record's layer or format is none."""
    try:
        if record.layer is None:
            raise RecordError("it names no layer")
        if record.case.whole or record.case.shape.past:
            raise RecordError("a budget is of a layer alone, without a past")
        kind = formats.get(str(record.settings["weight_format"]))
        config = LayerConfig(record.case.model, record.layer.config)
        return budget(config, record.case.shape, kind)
    except (KeyError, TypeError, ValueError, ArithmeticError, MemladderError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise RecordError(f"{record.case.id} has no budget: {reason}") from None


def _median(record: Record, read: Callable[[Run], int]) -> int:
    return round(statistics.median(map(read, record.runs)))


def _load_peak(run: Run) -> int:
    return max(run.phase(name).peak_bytes for name in _LOADING_PHASES)


def _growth(run: Run) -> int:
    """What the process grows by after its imports."""
    return run.steady_bytes - run.import_bytes
