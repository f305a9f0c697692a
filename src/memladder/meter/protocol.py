"""What runner and worker say to each other: one JSON line a message, typed and checked.

The runner writes one `Order` to the worker's standard input, then one answer for each `Hold`. The
worker writes messages to a pipe of its own, so that nothing a framework prints can be one.
Times are of CLOCK_MONOTONIC, which all processes of a machine share, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memladder.core import serial
from memladder.core.case import Case
from memladder.core.errors import MemladderError
from memladder.core.plan import CompilerPlan
from memladder.core.serial import StrEnum
from memladder.core.text import clean, cleaned
from memladder.core.verification import Check, StructureCheck
from memladder.frameworks._shared.base import Job, Setting
from memladder.models import LayerConfig, ModelConfig

GO_ON = b"go on\n"
AGAIN = b"again\n"
MAX_LINE = 1 << 20
MAX_REASON = 300


class Mode(StrEnum):
    """What a worker is started for."""

    PREPARE = "prepare"
    MEASURE = "measure"
    VERIFY = "verify"
    PLAN = "plan"


@dataclass(frozen=True)
class JobText:
    """A `Job` as it travels."""

    case: Case
    config: LayerConfig
    cache_dir: str
    seed: int
    model: ModelConfig | None = None

    @classmethod
    def of(cls, job: Job) -> JobText:
        """The travelling form of a job."""
        return cls(job.case, job.config, str(job.cache_dir), job.seed, job.model)

    def job(self) -> Job:
        """The job that was sent."""
        return Job(self.case, self.config, Path(self.cache_dir), self.seed, self.model)


@dataclass(frozen=True)
class Order:
    """One worker's task. `module` serves the framework; only VERIFY has many jobs."""

    mode: Mode
    module: str
    jobs: tuple[JobText, ...]
    steady_s: float


@dataclass(frozen=True)
class PhaseStart:
    """A phase begins."""

    name: str
    ns: int


@dataclass(frozen=True)
class Hold:
    """The phase's work is done; the worker keeps still until the runner has read its memory."""

    ns: int


@dataclass(frozen=True)
class Finished:
    """A measured session is over; `ns` is the end of its steady phase."""

    ns: int
    passes: int
    settings: Mapping[str, Setting]
    categories: Mapping[str, int]


@dataclass(frozen=True)
class Checked:
    """One narrow layer is compared with the reference: as a whole, and its leading tokens; or,
    where its output can't be read, what is held with what should be."""

    checks: tuple[Check, ...]
    settings: Mapping[str, Setting]
    structure: StructureCheck | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that the session will read is there. A library may end a process with status 0."""


@dataclass(frozen=True)
class Planned:
    """What the framework's compiler says of the job."""

    plan: CompilerPlan
    settings: Mapping[str, Setting]


class Kind(StrEnum):
    """How a worker fails: a record's status, or a refusal, which is the caller's error."""

    OOM = "oom"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Failure:
    """The worker's last message when it can't go on."""

    kind: Kind
    message: str
    asked_bytes: int | None
    hint: str | None


Message = PhaseStart | Hold | Finished | Checked | Prepared | Planned | Failure
_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (PhaseStart, Hold, Finished, Checked, Prepared, Planned, Failure)
}


def encode(message: Message | Order) -> bytes:
    """A message as one line."""
    return serial.dumps({type(message).__name__: message}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line. Raises ValueError when it is not exactly one."""
    try:
        ((name, body),) = serial.loads(line).items()
        return serial.from_json(_KINDS[name], cleaned(body))
    except (ValueError, KeyError, AttributeError, RecursionError, MemladderError) as error:
        raise ValueError(f"not a worker's message: {line[:60]!r}") from error


def decode_order(line: bytes) -> Order:
    """The order in a line. Raises ValueError."""
    return serial.from_json(Order, serial.loads(line)["Order"])


def one_line(text: str) -> str:
    """The first line of a text that has any ink, cleaned and cut to what a reason may hold."""
    lines = (clean(line, MAX_REASON) for line in text.splitlines())
    return next((line for line in lines if line), "")
