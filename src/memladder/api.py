"""What the package does, as functions: the commands are these with words around them.

`memladder` itself has them all, loaded when one is asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memladder import frameworks
from memladder.accounting import diff as differing
from memladder.accounting import split
from memladder.accounting.diff import Difference
from memladder.core.case import Case, Workload
from memladder.core.errors import RecordError, UsageError
from memladder.core.ledger import Ledger
from memladder.core.record import Record
from memladder.core.verification import Verification
from memladder.frameworks._shared.base import Job
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.models import Subject
from memladder.models.cache import default_dir
from memladder.paper import rows as figure11
from memladder.paper.published import published
from memladder.reports.table import Row, rows
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps import store, subjects
from memladder.sweeps.executors import serial


def measure(
    model: str = "llama",
    framework: str = "pytorch",
    *,
    batch_size: int = 1,
    seq_len: int = 1,
    past: int = 0,
    layer: int | None = None,
    layers: int | str = 1,
    device: str = "auto",
    repeats: int = 1,
    timeout_s: float = 1800.0,
    cache_dir: Path | None = None,
    log: Path | None = None,
) -> Record:
    """Measure one case in processes of its own; the record says how it ended.

    `model` is a name or a Hugging Face `config.json` (or its folder), `layers` a number or `all`.
    `log` keeps the record and the worker's output in a folder. Raises UsageError and ConfigError
    for what can't be measured; a framework that is not here gives a record that says so.
    """
    where = (cache_dir or default_dir()).absolute()
    ((name, subject),) = subjects.subjects([model], where, layer=layer, layers=layers).items()
    workload = Workload(batch_size, seq_len, past)
    case = Case(name, framework, workload, environment.resolve_device(device), layers)
    options = serial.SweepOptions(where, repeats, runner.Limits(timeout_s=timeout_s))
    with _folder(log) as folder:
        kept = store.Store(folder)
        with kept.locked():
            record = measured(case, subject, options, kept)
            kept.save(record)
    return record


def measured(
    case: Case,
    subject: Subject,
    options: serial.SweepOptions,
    kept: store.Store,
    on_event: Callable[[runner.Event], None] | None = None,
) -> Record:
    """Measure a case, with the worker's output in a store that the caller has locked."""
    found = frameworks.get(case.framework)
    return runner.measure(
        Job.of(case, subject, options.cache_dir),
        found,
        repeats=options.repeats,
        limits=options.limits,
        log_path=kept.log_path(kept.name(case)),
        on_event=on_event,
    )


@dataclass(frozen=True)
class Swept:
    """What a sweep gave: records of all cases, also of those that can't run here."""

    records: tuple[Record, ...]
    verifications: tuple[Verification, ...]
    succeeded: bool


def sweep(
    models: Sequence[str] = tuple(figure11.MODELS),
    frameworks: Sequence[str] = tuple(figure11.SYSTEMS),
    workloads: Sequence[Workload] = figure11.SHAPES,
    *,
    layers: int | str = 1,
    device: str = "auto",
    repeats: int = 1,
    timeout_s: float = 1800.0,
    cache_dir: Path | None = None,
    log: Path = Path("log"),
    fresh: bool = False,
    view: serial.View | None = None,
) -> Swept:
    """Measure all combinations into the folder `log`; what it has of this environment is kept.

    Each framework is first verified against the fp32 reference. `view` is told what happens.
    Raises UsageError, and LockedError where another process measures into the folder.
    """
    where = (cache_dir or default_dir()).absolute()
    chosen = subjects.subjects(models, where, layers=layers)
    on = environment.resolve_device(device)
    can_run, missing = available(frameworks, on)
    options = serial.SweepOptions(where, repeats, runner.Limits(timeout_s=timeout_s), fresh=fresh)
    kept = store.Store(log)
    cases = sweep_cases.select(chosen, can_run, workloads, on, layers)
    with kept.locked():
        outcome = serial.sweep(cases, chosen, kept, options, view or _Silent())
    absent = unavailable(sweep_cases.select(chosen, missing, workloads, on, layers))
    return Swept((*outcome.records, *absent), outcome.verifications, outcome.succeeded)


def available(names: Iterable[str], device: str) -> tuple[list[str], list[str]]:
    """Frameworks that can run, or plan, on a device here, and the others. Raises UsageError."""
    can_run = {name: sweep_cases.availability(name, device).available for name in names}
    return [name for name in can_run if can_run[name]], [n for n in can_run if not can_run[n]]


def unavailable(cases: Iterable[Case]) -> list[Record]:
    """Records of cases whose framework is not here, each with its reason."""
    return [
        runner.unavailable(case, sweep_cases.availability(case.framework, case.device))
        for case in cases
    ]


def table(path: str | Path) -> tuple[Row, ...]:
    """A row for every case in a folder of records or a results file, beside the published values.

    Raises UsageError where nothing is there, RecordError for an entry that is no record.
    """
    found = _read(path)
    known = published().values
    return rows(found.records, known, found.verifications)


def explain(record: Record | str | Path) -> Ledger:
    """Where a measured record's bytes went: a partition of its steady bytes, which it sums to."""
    return split.ledger(_record(record))


def diff(before: Record | str | Path, after: Record | str | Path) -> Difference:
    """What changed between two measured records, by category, the largest first."""
    return differing.diff(_record(before), _record(after))


def _record(given: Record | str | Path) -> Record:
    if isinstance(given, Record):
        return given
    found = _read(given).records
    if len(found) != 1:
        raise UsageError(f"{given} holds {len(found)} records; one is wanted")
    return found[0]


def _read(path: str | Path) -> store.Contents:
    found = store.read(Path(path))
    for name, reason in found.foreign.items():
        raise RecordError(f"{name} is not a record of memladder ({reason})")
    return found


@contextmanager
def _folder(log: Path | None) -> Iterator[Path]:
    if log is not None:
        yield log
        return
    with tempfile.TemporaryDirectory(prefix="memladder-") as folder:
        yield Path(folder)


class _Silent:
    """A view that shows nothing."""

    def started(self, case: Case) -> None:
        """Nothing."""

    def verifying(self, framework: str) -> None:
        """Nothing."""

    def event(self, event: runner.Event) -> None:
        """Nothing."""

    def finished(self, record: Record, seconds: float, resumed: bool) -> None:
        """Nothing."""

    def warning(self, text: str) -> None:
        """Nothing."""
