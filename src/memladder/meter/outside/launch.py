"""One worker behind its guard: started, talked to, and ended whatever happens."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from memladder.core import children, processes
from memladder.core.errors import WorkerError
from memladder.environments import interpreter
from memladder.meter.protocol import MAX_LINE, Order, encode

# The guard kills at once; a process stuck in a driver call may take its time to die.
_END_S = 40.0
_REAP_S = 0.01
_PYTHON = {"PYTHONUNBUFFERED": "1"}
_MARK = "MEMLADDER_WORKER"


class GuardedWorker:
    """A worker process. When the `with` block is left, nothing that it started is alive.

    It starts with the interpreter of its framework. `variables` are added to this process's
    environment; `output` is a descriptor for what it prints.
    """

    def __init__(self, order: Order, variables: Mapping[str, str], output: int) -> None:
        # Whom the guard can't end any more, because it was killed, we can.
        processes.ADOPTION.enter()
        leash, self._leash = os.pipe()
        self._events, events = os.pipe()
        control, self._control = os.pipe()
        self._closing = threading.Lock()
        number = uuid.uuid4().hex
        self._mark = f"{_MARK}={number}"
        python = interpreter.chosen(order.jobs[0].case.framework)
        self._buffer = b""
        self.output_ended = False
        try:
            self._guard = children.start(
                _command(python.python, control, events),
                stdin=leash,
                stdout=output,
                stderr=output,
                pass_fds=(control, events),
                env={**python.environ(), **variables, **_PYTHON, _MARK: number},
            )
            for descriptor in (leash, events, control):
                os.close(descriptor)
            self._write(encode(order))
        except BaseException:
            # The guard ends when its leash does.
            os.close(self._leash)
            processes.ADOPTION.leave()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises WorkerError where something stays alive whatever it is sent."""
        self.end()
        deadline = time.monotonic() + _END_S
        try:
            while self._guard.poll() is None:
                if self.stopped() or time.monotonic() > deadline:
                    self._guard.kill()
                time.sleep(_REAP_S)
            self._end_orphans()
        finally:
            processes.ADOPTION.leave()
            os.close(self._events)
            os.close(self._control)

    @property
    def root(self) -> int:
        """The guard's process id; all that is below it is the worker's."""
        return self._guard.pid

    def end(self) -> None:
        """Let the guard kill everything; returns at once. Any thread may call it, repeatedly."""
        with self._closing:
            if self._leash >= 0:
                os.close(self._leash)
                self._leash = -1

    def status(self) -> int | None:
        """The worker's exit status, −N for signal N; None while anything of it is alive.

        It is the guard's own where that was killed; `orphans` tells.
        """
        return self._guard.poll()

    def stopped(self) -> bool:
        """Has somebody stopped the guard, so that it can end nothing?"""
        return processes.state(self._guard.pid) == "T"

    def orphans(self) -> list[int]:
        """What the worker started and the guard, being gone, has not ended; dead ones not reaped
        too. They keep the guard's session, or the environment that they began with."""
        below = processes.descendants(os.getpid())
        return [
            pid
            for pid in below
            if processes.session(pid) == self._guard.pid or processes.has_variable(pid, self._mark)
        ]

    def answer(self, line: bytes) -> None:
        """Answer the worker's hold."""
        self._write(line)

    def lines(self, timeout_s: float) -> list[bytes]:
        """Whole lines that the worker has written, waiting for them at most `timeout_s`.

        Raises ValueError for a line that no message can be.
        """
        ready, _, _ = select.select([self._events], [], [], timeout_s)
        if not ready:
            return []
        data = os.read(self._events, 1 << 16)
        self.output_ended = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MAX_LINE or (self.output_ended and self._buffer):
            raise ValueError(f"not a worker's message: {self._buffer[:60]!r}")
        return lines

    def _end_orphans(self) -> None:
        """Kill and reap what the guard has left, as long as there is any."""
        deadline = time.monotonic() + _END_S
        # A dead one that is not reaped has lost its environment, and may have had its own session.
        left: set[int] = set()
        while left := {pid for pid in {*left, *self.orphans()} if not _ended(pid)}:
            if time.monotonic() > deadline:
                raise WorkerError(f"process {min(left)}, which the worker started, can't be ended")
            time.sleep(_REAP_S)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._control, data) :]
            except BrokenPipeError:
                # The worker is gone; its exit status says more than this.
                return


def _ended(pid: int) -> bool:
    """Kill a process; is it gone, and reaped?"""
    try:
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ProcessLookupError:
        return True
    except (ChildProcessError, PermissionError):
        # Its parent, if that dies too, leaves it to us.
        return False


def _command(python: Path, control: int, events: int) -> list[str]:
    """The guard runs in our interpreter, the worker in its framework's."""
    worker = children.module(
        "memladder.meter.inside.worker", str(events), python=python, options=("-X", "faulthandler")
    )
    return children.module("memladder.meter.inside.guard", str(os.getpid()), str(control), *worker)


def how_it_ended(status: int) -> str:
    """An exit status in words.

    >>> how_it_ended(3), how_it_ended(-11), how_it_ended(-37)
    ('exited with status 3', 'was ended by SIGSEGV', 'was ended by SIGRTMIN+3')
    """
    if status >= 0:
        return f"exited with status {status}"
    return f"was ended by {_signal_name(-status)}"


def _signal_name(number: int) -> str:
    """As `kill -l` has it; real-time signals have no names but the first and the last."""
    if number in list(signal.Signals):
        return signal.Signals(number).name
    first = int(signal.SIGRTMIN)
    return f"SIGRTMIN+{number - first}" if number > first else f"signal {number}"
