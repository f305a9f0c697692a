"""Watching one worker from its start to its end: messages in, memory sampled, limits kept."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memladder.core.devices import Device
from memladder.core.host import HostMemory
from memladder.core.record import Status
from memladder.meter.environment import RUNNER_VARIABLES
from memladder.meter.outside.launch import GuardedWorker, how_it_ended
from memladder.meter.outside.sampler import HostGuard, Sampler
from memladder.meter.outside.samples import Samples, Span
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
    decode,
    one_line,
)

_WAIT_S = 0.02
_NOTIFY_S = 0.25
# A worker that the kernel killed with the host this full died for want of memory.
_NEARLY_FULL = 0.85
# Steady goes on, up to this many times its length, until PSS was counted within 1 % of RSS's peak.
_STEADY_STRETCH = 5
_PSS_BOUND = 0.01
_MAX_WORDS = 1 << 22


@dataclass(frozen=True)
class Limits:
    """What one worker may take. `host_fraction` is of host memory in use by everybody,
    `case_bytes` of resident bytes of the worker's own processes; None means no such limit."""

    timeout_s: float = 1800.0
    host_fraction: float = 0.92
    case_bytes: int | None = None


@dataclass(frozen=True)
class Problem:
    """Why a worker did not do what it was started for."""

    status: Status
    reason: str
    hint: str | None = None
    asked_bytes: int | None = None
    refused: bool = False


@dataclass
class Story:
    """What a worker has said, and what was read of it.

    `others` are foreign processes on the device (name, most bytes), `before` those of the start.
    """

    starts: list[PhaseStart] = field(default_factory=list)
    finished: Finished | None = None
    checked: list[Checked] = field(default_factory=list)
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
        self._words_from = 0
        self.story = Story()

    def run(self, variables: Mapping[str, str], log: Path) -> Story:
        """Start the worker, stay until it and all that it started is gone, and tell its story."""
        idle = None
        if self._device is not None:
            idle = self._device.used_bytes()
            self.story.before = frozenset(one.pid for one in self._device.processes())
        self._words_from = log.stat().st_size
        with GuardedWorker(self._order, {**RUNNER_VARIABLES, **variables}, log) as worker:

            def on_poll(rss: int) -> None:
                reason = self._memory.breach(rss)
                if reason is not None:
                    self._end(worker, Problem(Status.OOM, reason, asked_bytes=rss))

            with Sampler(worker.root, self._device, on_poll) as sampler:
                self.story.samples = sampler.samples
                sampler.samples.idle = idle
                status = self._attend(worker, sampler)
                self.story.others = sampler.foreign()
        if self.story.problem is None:
            self.story.problem = self._judge(status, log)
        return self.story

    def _attend(self, worker: GuardedWorker, sampler: Sampler) -> int | None:
        """Stay with the worker; its exit status, or None when it had to be ended."""
        deadline = time.monotonic() + self._limits.timeout_s
        status = None
        while status is None or not worker.output_ended:
            status = worker.status()
            try:
                for line in worker.lines(_WAIT_S):
                    self._take(decode(line), worker, sampler)
            except ValueError as error:
                self._end(worker, self._failed(str(error)))
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
            case Planned():
                story.planned = message
            case Failure():
                story.problem = story.problem or self._complaint(message)

    def _complaint(self, failure: Failure) -> Problem:
        if failure.kind is Kind.REFUSED:
            return Problem(Status.FAILED, failure.message, refused=True)
        reason = f"{failure.message} (in phase {self._place})"
        return Problem(Status(failure.kind), reason, failure.hint, failure.asked_bytes)

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

    def _judge(self, status: int | None, log: Path) -> Problem | None:
        """What an exit status means for a worker that nobody ended and that did not complain."""
        assert status is not None
        if status == 0 and self._is_done():
            return None
        if status == -signal.SIGKILL and self._memory_was_short():
            return Problem(
                Status.OOM,
                f"the kernel killed the worker when host memory was {self._memory.fullest:.0%} "
                f"full (in phase {self._place})",
            )
        words = last_words(log, self._words_from)
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
                return True

    def _memory_was_short(self) -> bool:
        killed = self._host.oom_kills() > self._kills_before
        return killed or self._memory.fullest > _NEARLY_FULL


def last_words(log: Path, start: int) -> str:
    """The last line with ink logged from byte `start` on; a crash's stack is passed over."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read(_MAX_WORDS).decode(errors="replace")
    before, crash, _ = text.partition("Fatal Python error: ")
    lines = [line.strip() for line in (before if crash else text).splitlines() if line.strip()]
    return lines[-1] if lines else ""
