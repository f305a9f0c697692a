"""The record: everything known about one measured case, immutable and schema-versioned.

docs/reference/record.md describes each field. Sizes are bytes, times seconds, both from the
monotonic clock.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from memladder.core import serial
from memladder.core.case import Case
from memladder.core.errors import MemladderError, RecordError
from memladder.core.plan import CompilerPlan
from memladder.core.serial import StrEnum, younger
from memladder.core.text import shown
from memladder.core.units import format_bytes

if TYPE_CHECKING:
    from memladder.core.verification import Verification

SCHEMA = 1
T = TypeVar("T")

PHASES = ("import", "context", "weights", "compile", "first run", "steady")


class Status(StrEnum):
    """How a case ended. Only `measured` may be drawn as a measurement."""

    MEASURED = "measured"
    PLANNED = "planned"
    PREDICTED = "predicted"
    OOM = "oom"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    TIMEOUT = "timeout"


class Source(StrEnum):
    """Where the headline bytes of a run come from."""

    NVML_PROCESS = "nvml_process"
    NVML_DEVICE_DELTA = "nvml_device_delta"
    PSS = "pss"


@dataclass(frozen=True)
class Machine:
    """Where a case ran. `device` is the GPU's name, or the processor's for the CPU; its memory is
    None where the driver does not tell it."""

    device: str
    # Virtual machines exist that grow as memory is used: sizes say nothing of which machine it is.
    device_memory_bytes: int | None = field(compare=False)
    driver: str | None
    cuda: str | None
    cpu: str
    cores: int
    memory_bytes: int = field(compare=False)
    os: str
    kernel: str


@dataclass(frozen=True)
class Environment:
    """The machine and the software of one record.

    `python` and `packages` are the worker's. `interpreter` says whose they are: None for
    memladder's own, else `environments.Interpreter.label`.
    """

    machine: Machine
    python: str
    packages: Mapping[str, str]
    variables: Mapping[str, str]
    commit: str | None
    memladder: str
    interpreter: str | None = None

    @property
    def python_label(self) -> str:
        """The worker's Python in words: its version, and whose it is where it is not our own."""
        return f"{self.python} ({self.interpreter})" if self.interpreter else self.python

    def same_as(self, other: Environment) -> bool:
        """Would the two give comparable numbers? The commit alone does not decide that."""
        return (self.machine, self.python, self.packages, self.variables, self.memladder) == (
            other.machine,
            other.python,
            other.packages,
            other.variables,
            other.memladder,
        )


@dataclass(frozen=True)
class LayerFacts:
    """The layer that ran: its configuration, its parameters, the seed of its weights.

    Of a whole model, `parameters` are all of them, those around the layers too, and `layers` is
    how many ran. `note` tells what of a configuration was left out.
    """

    config: Mapping[str, Any]
    digest: str
    parameters: int
    weight_bytes: int
    seed: int
    layers: int = younger(1)
    note: str | None = None


@dataclass(frozen=True)
class ForeignProcess:
    """A process of somebody else seen on the device; `peak_bytes` where the driver tells them."""

    pid: int
    name: str
    peak_bytes: int | None


@dataclass(frozen=True)
class PhaseUse:
    """One phase of one run. `peak_bytes`, `end_bytes` and the device's are of the run's `source`.

    RSS is polled at the full rate, PSS counted less often: `pss_missed_bytes` is how far RSS rose
    above the highest value at which PSS was counted, and so bounds what `pss_peak_bytes` can lack.
    """

    name: str
    start_s: float
    end_s: float
    polls: int
    peak_bytes: int
    end_bytes: int
    device_peak_bytes: int | None
    device_total_peak_bytes: int | None
    pss_peak_bytes: int
    uss_peak_bytes: int
    rss_peak_bytes: int
    pss_missed_bytes: int

    def __post_init__(self) -> None:
        if self.name not in PHASES:
            raise RecordError(f"phase {self.name[:40]!r} is not one of {', '.join(PHASES)}")
        refuse_negative(f"phase {self.name}", self)
        if self.end_s < self.start_s:
            raise RecordError(f"phase {self.name} ends at {self.end_s} s, before it starts")


@dataclass(frozen=True)
class TracePoint:
    """One kept poll: time since the run's start, and what was read then."""

    s: float
    device_bytes: int | None
    pss_bytes: int
    rss_bytes: int


@dataclass(frozen=True)
class Run:
    """One repeat of a case, from its own process."""

    started: str
    source: Source
    phases: tuple[PhaseUse, ...]
    passes: int
    polls: int
    polls_per_s: float
    longest_gap_s: float
    idle_device_bytes: int | None
    foreign: tuple[ForeignProcess, ...]
    categories: Mapping[str, int]
    trace: tuple[TracePoint, ...]

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if names != [name for name in PHASES if name in names] or "steady" not in names:
            raise RecordError(f"a run's phases are {', '.join(names)}; they end with steady")
        refuse_negative("a run", self)
        refuse_negative("a category", self.categories)
        if not self.steady_bytes:
            raise RecordError("a run that took no memory in its steady phase")

    def phase(self, name: str) -> PhaseUse:
        """The phase of that name. Raises RecordError where the run has none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise RecordError(f"a run without the phase {name}")

    @property
    def steady_bytes(self) -> int:
        """High-water mark of the steady phase: what the process needs to go on working."""
        return self.phase("steady").peak_bytes

    @property
    def import_bytes(self) -> int:
        """What the process had when its libraries were imported and nothing was loaded. Raises
        RecordError where that phase is not in the run."""
        return self.phase("import").end_bytes

    @property
    def peak_bytes(self) -> int:
        """High-water mark of the whole run, loading and compiling included."""
        return max(phase.peak_bytes for phase in self.phases)


@dataclass(frozen=True)
class Record:
    """One case and how it ended. Measured bytes exist only where `status` is `measured`.

    `plan` is there where it is `planned`; `asked_bytes` is then all of the plan's bytes.
    """

    case: Case
    status: Status
    reason: str | None
    hint: str | None
    asked_bytes: int | None
    layer: LayerFacts | None
    settings: Mapping[str, str | int | float | bool]
    environment: Environment
    runs: tuple[Run, ...]
    plan: CompilerPlan | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"schema {self.schema} is not {SCHEMA}, the one this version reads")
        if (self.status is Status.MEASURED) != bool(self.runs):
            raise RecordError(f"{self.case.id}: status {self.status} with {len(self.runs)} runs")
        if (self.status is Status.PLANNED) != (self.plan is not None):
            raise RecordError(f"{self.case.id}: status {self.status} and plan {self.plan}")
        if self.plan is not None and self.asked_bytes != self.plan.nbytes:
            raise RecordError(f"{self.case.id}: {self.asked_bytes} bytes, plan {self.plan.nbytes}")
        if self.status is not Status.MEASURED and not self.reason:
            raise RecordError(f"{self.case.id}: status {self.status} without a reason")
        refuse_negative(self.case.id, self)

    def __repr__(self) -> str:
        steady = self.steady_bytes
        told = self.reason if steady is None else format_bytes(steady)
        return f"<Record {self.case.id} on {self.case.device}: {self.status}, {shown(str(told))}>"

    def _repr_html_(self) -> str:
        """The phases of the first run, as notebooks show it; all of it escaped."""
        phases = self.runs[0].phases if self.runs else ()
        rows = "".join(
            f"<tr><td>{html.escape(phase.name)}</td><td>{format_bytes(phase.peak_bytes)}</td></tr>"
            for phase in phases
        )
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"

    @property
    def steady_bytes(self) -> int | None:
        """Median over the runs of the steady phase's high-water mark; None unless measured."""
        return round(statistics.median(r.steady_bytes for r in self.runs)) if self.runs else None

    @property
    def peak_bytes(self) -> int | None:
        """Largest high-water mark of any run and phase; None unless measured."""
        return max((run.peak_bytes for run in self.runs), default=None)

    @property
    def import_bytes(self) -> int | None:
        """Median over the runs of what imported libraries take on the CPU, where they are a part of
        `steady_bytes` that depends on how they were built; None on a device, or unless measured."""
        runs = [run for run in self.runs if run.source is Source.PSS]
        if not runs or any(run.phases[0].name != "import" for run in runs):
            return None
        return round(statistics.median(run.import_bytes for run in runs))

    @property
    def over_import_bytes(self) -> int | None:
        """What `steady_bytes` adds to `import_bytes`; None where there are none."""
        runs = self.runs if self.import_bytes is not None else ()
        grown = [run.steady_bytes - run.import_bytes for run in runs]
        return round(statistics.median(grown)) if grown else None

    @property
    def spread(self) -> float | None:
        """(max − min) / median of `steady_bytes` over the runs; None below two runs."""
        if len(self.runs) < 2:
            return None
        values = [run.steady_bytes for run in self.runs]
        return (max(values) - min(values)) / statistics.median(values)


def refuse_negative(what: str, holder: object) -> None:
    """Raise RecordError where a number of a dataclass or mapping is below zero."""
    numbers = holder if isinstance(holder, Mapping) else vars(holder)
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and value < 0:
            raise RecordError(f"{what}: {name} is {value}, and can't be below 0")


def dumps(record: Record | Verification) -> str:
    """The JSON text of a record."""
    return serial.dumps(record, indent=1) + "\n"


def loads_record(text: str) -> Record:
    """The record in a JSON text. Raises RecordError."""
    return loads(Record, text)


def loads(kind: type[T], text: str) -> T:
    """The record or verification in a JSON text. Raises RecordError."""
    try:
        return serial.from_json(kind, serial.loads(text))
    except (ValueError, MemladderError) as error:
        raise RecordError(f"not a memladder {kind.__name__.lower()}: {error}") from None
