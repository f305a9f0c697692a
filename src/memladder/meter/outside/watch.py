"""Watching one worker from its start to its end: messages in, memory sampled, limits kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from memladder.core.devices import Device
from memladder.core.errors import RecordError, WorkerError
from memladder.core.host import HostMemory
from memladder.core.processes import Resident
from memladder.core.record import PHASES, Status
from memladder.core.text import clean
from memladder.core.units import format_bytes
from memladder.meter.environment import RUNNER_VARIABLES
from memladder.meter.outside.launch import GuardedWorker, how_it_ended
from memladder.meter.outside.log import Log, Output
from memladder.meter.outside.sampler import Sampler
from memladder.meter.outside.samples import Samples, Span
from memladder.meter.outside.shortage import HostGuard, Shortage, who_holds
from memladder.meter.protocol import (
    AGAIN,
    GO_ON,
    Checked,
    Failure,
    Finished,
    Hold,
    Kind,
    Message,
    Mode,
    Order,
    PhaseStart,
    Planned,
    Prepared,
    decode,
    one_line,
)

_WAIT_S = 0.02
_NOTIFY_S = 0.25
# A worker that was killed with the host this full may have died for want of memory.
_NEARLY_FULL = 0.85
# What a dead worker has written is there to read; somebody else may hold the pipe's other end.
_DRAIN_S = 1.0
_NAMED = 3
# Steady goes on, up to this many times its length, until PSS was counted within 1 % of RSS's peak.
_STEADY_STRETCH = 5
_PSS_BOUND = 0.01


@dataclass(frozen=True)
class Limits:
    """What one worker may take. `host_fraction` is of host memory in use by everybody,
    `case_bytes` of resident bytes of the worker's own processes; None means no such limit.

    `patience_s` is how long a case waits for memory that others hold, in all.
    """

    timeout_s: float = 1800.0
    host_fraction: float = 0.92
    case_bytes: int | None = None
    patience_s: float = 60.0


@dataclass(frozen=True)
class Problem:
    """Why a worker did not do what it was started for. `needed_bytes` are what it lacks where it is
    `busy`: what it held, and asked for."""

    status: Status
    reason: str
    hint: str | None = None
    asked_bytes: int | None = None
    refused: bool = False
    needed_bytes: int = 0


@dataclass
class Story:
    """What a worker has said, and what was read of it.

    `others` are foreign processes on the device (name, most bytes), `before` those of the start.
    """

    starts: list[PhaseStart] = field(default_factory=list)
    finished: Finished | None = None
    checked: list[Checked] = field(default_factory=list)
    prepared: bool = False
    planned: Planned | None = None
    samples: Samples = field(default_factory=Samples)
    others: Mapping[int, tuple[str, int | None]] = field(default_factory=dict)
    before: frozenset[int] = frozenset()
    problem: Problem | None = None

    @property
    def phase(self) -> str:
        """The phase that the worker is in, or was in last."""
        return self.starts[-1].name if self.starts else "start"

    def spans(self) -> list[Span]:
        """The phases with their times; each ends where the next begins.

        A first run that was too long to be repeated was the steady phase.
        """
        assert self.finished is not None
        names = [start.name for start in self.starts]
        if names[-1] == "first run":
            names[-1] = "steady"
        ends = [*(start.ns for start in self.starts[1:]), self.finished.ns]
        starts = (start.ns for start in self.starts)
        return [Span(*one) for one in zip(names, starts, ends, strict=True)]


class Watch:
    """One worker's run. `notify` gets phase and current bytes now and then, and may raise."""

    def __init__(
        self,
        order: Order,
        limits: Limits,
        device: Device | None,
        notify: Callable[[str, int], None],
    ) -> None:
        self._order = order
        self._limits = limits
        self._device = device
        self._notify = notify
        self._host = HostMemory()
        self._memory = HostGuard(self._host, limits.host_fraction, limits.case_bytes)
        self._kills_before = self._host.oom_kills()
        self._told_at = 0.0
        self.story = Story()

    def run(self, variables: Mapping[str, str], log: Log) -> Story:
        """Start the worker, stay until it and all that it started is gone, and tell its story."""
        idle = None
        if self._device is not None:
            idle = self._device.used_bytes()
            self.story.before = frozenset(one.pid for one in self._device.processes())
        status = None
        output = Output(log)
        try:
            with output:
                status = self._watched({**RUNNER_VARIABLES, **variables}, output.pipe, idle)
        except WorkerError as error:
            # Something stays alive whatever it is sent: this case's failure, not the next one's.
            self.story.problem = self.story.problem or self._failed(str(error))
        if self.story.problem is None:
            self.story.problem = self._judge(status, output)
        return self.story

    def _watched(self, variables: Mapping[str, str], output: int, idle: int | None) -> int | None:
        with GuardedWorker(self._order, variables, output) as worker:

            def on_poll(now: Resident, pids: Sequence[int]) -> None:
                found = self._memory.breach(now, (*pids, worker.root, os.getpid()))
                if found is not None:
                    status = Status.OOM if found.is_own else Status.BUSY
                    held = found.own
                    self._end(worker, Problem(status, found.reason, None, held, needed_bytes=held))

            with Sampler(worker.root, self._device, on_poll) as sampler:
                self.story.samples = sampler.samples
                sampler.samples.idle = idle
                status = self._attend(worker, sampler)
                self.story.others = sampler.foreign()
        return status

    def _attend(self, worker: GuardedWorker, sampler: Sampler) -> int | None:
        """Stay with the worker; its exit status, or None when it had to be ended."""
        deadline = time.monotonic() + self._limits.timeout_s
        status = ended = None
        while status is None or not worker.output_ended:
            status = worker.status()
            if status is not None:
                ended = ended or time.monotonic()
                if worker.orphans():
                    self._end(worker, self._failed(f"the worker's guard {how_it_ended(status)}"))
                if time.monotonic() > ended + _DRAIN_S:
                    break
            elif worker.stopped():
                self._end(worker, self._failed("the worker's guard was stopped"))
                break
            try:
                for line in worker.lines(_WAIT_S):
                    self._take(decode(line), worker, sampler)
            except (ValueError, RecordError) as error:
                self._end(worker, self._failed(clean(str(error))))
                break
            if worker.output_ended and status is None:
                time.sleep(_WAIT_S)
            if sampler.error is not None:
                self._end(worker, self._failed(f"sampling stopped: {sampler.error}"))
                break
            if time.monotonic() > deadline:
                reason = f"still in phase {self._place} after {self._limits.timeout_s:g} s"
                self._end(worker, Problem(Status.TIMEOUT, reason))
                break
            self._tell(sampler, time.monotonic() - self._told_at > _NOTIFY_S)
        return status

    def _take(self, message: Message, worker: GuardedWorker, sampler: Sampler) -> None:
        story = self.story
        require_order(story, message, time.monotonic_ns())
        match message:
            case PhaseStart():
                story.starts.append(message)
                sampler.begin_phase()
                self._tell(sampler, True)
            case Hold():
                sampler.read_still()
                worker.answer(AGAIN if self._wants_more(message, sampler.samples) else GO_ON)
            case Finished():
                story.finished = message
            case Checked():
                story.checked.append(message)
            case Prepared():
                story.prepared = True
            case Planned():
                story.planned = message
            case Failure():
                story.problem = story.problem or self._complaint(message, sampler)

    def _complaint(self, failure: Failure, sampler: Sampler) -> Problem:
        if failure.kind is Kind.REFUSED:
            return Problem(Status.FAILED, failure.message, refused=True)
        reason, asked = f"{failure.message} (in phase {self._place})", failure.asked_bytes
        found = Problem(Status(failure.kind), reason, failure.hint, asked)
        if found.status is Status.OOM:
            short = self._shortage(sampler)
            if not short.explains(asked):
                return replace(
                    found,
                    status=Status.BUSY,
                    reason=f"{reason}; {self._who_holds(sampler)}",
                    needed_bytes=short.own + (asked or 0),
                )
        return found

    def _shortage(self, sampler: Sampler) -> Shortage:
        """Who holds the memory that the case runs in, at this moment."""
        limit = self._device.memory_bytes if self._device else None
        if self._device is None or limit is None:
            # A GPU whose memory is not told shares the host's.
            return self._memory.now(sampler.held)
        total, own = self._device.used_bytes(), sampler.device_bytes
        if own is None:
            own = max(total - (sampler.samples.idle or 0), 0)
        return Shortage(own, max(total - own, 0), limit)

    def _who_holds(self, sampler: Sampler) -> str:
        if self._device is None:
            return who_holds((os.getpid(), *sampler.pids))
        found = [one for one in self._device.processes() if one.pid not in sampler.pids]
        names = ", ".join(f"{one.name} ({one.pid})" for one in found[:_NAMED])
        return f"others on the device: {names or 'none that can be seen here'}"

    def _tell(self, sampler: Sampler, now: bool) -> None:
        if now:
            self._told_at = time.monotonic()
            self._notify(self._place, sampler.current_bytes)

    @property
    def _place(self) -> str:
        mode = self._order.mode
        return self.story.phase if mode is Mode.MEASURE else str(mode)

    def _failed(self, reason: str) -> Problem:
        return Problem(Status.FAILED, f"{reason} (in phase {self._place})")

    def _end(self, worker: GuardedWorker, problem: Problem) -> None:
        self.story.problem = self.story.problem or problem
        worker.end()

    def _wants_more(self, hold: Hold, samples: Samples) -> bool:
        """Was the steady phase's PSS peak perhaps missed, and may the phase go on?"""
        start = self.story.starts[-1]
        length = (hold.ns - start.ns) / 1e9
        longest = _STEADY_STRETCH * self._order.steady_s
        if start.name != "steady" or self._device is not None or length > longest:
            return False
        so_far = Span(start.name, start.ns, time.monotonic_ns())
        use = samples.phase(so_far, start.ns, samples.source())
        return use.pss_missed_bytes > _PSS_BOUND * use.pss_peak_bytes

    def _judge(self, status: int | None, output: Output) -> Problem | None:
        """What an exit status means for a worker that nobody ended and that did not complain."""
        assert status is not None
        if status == 0 and self._is_done():
            return None
        if status == -signal.SIGKILL and (found := self._killed_for_memory()):
            return found
        words = output.last_words()
        tail = f"; its last words: {words}" if words else ""
        return self._failed(one_line(f"the worker {how_it_ended(status)}{tail}"))

    def _is_done(self) -> bool:
        match self._order.mode:
            case Mode.MEASURE:
                return self.story.finished is not None
            case Mode.VERIFY:
                return len(self.story.checked) == len(self._order.jobs)
            case Mode.PLAN:
                return self.story.planned is not None
            case Mode.PREPARE:
                return self.story.prepared

    def _killed_for_memory(self) -> Problem | None:
        by_kernel = self._host.oom_kills() > self._kills_before
        short = self._memory.shortage
        reason = (
            f"the worker was killed when host memory was {self._memory.fullest:.0%} full, "
            f"{format_bytes(short.own)} by the case (in phase {self._place})"
        )
        if (by_kernel or self._memory.fullest > _NEARLY_FULL) and short.is_own:
            return Problem(Status.OOM, reason, asked_bytes=short.own)
        if by_kernel:
            reason = f"{reason}; {who_holds([os.getpid()])}"
            return Problem(Status.BUSY, reason, None, short.own, needed_bytes=short.own)
        return None


def require_order(story: Story, message: Message, now_ns: int) -> None:
    """Raise ValueError for a message that can't follow those before it, or is of the future."""
    match message:
        case PhaseStart(name, ns):
            done = [start.name for start in story.starts]
            follows = name in PHASES and not set(PHASES[PHASES.index(name) :]) & set(done)
        case Hold(ns) | Finished(ns=ns):
            follows = bool(story.starts)
        case _:
            return
    last = story.starts[-1].ns if story.starts else 0
    if not follows or story.finished is not None or not last <= ns <= now_ns:
        raise ValueError(f"a worker's message out of order: {message!s:.120}")
