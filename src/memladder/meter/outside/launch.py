"""One worker behind its guard: started, talked to, and ended whatever happens."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from memladder.core.errors import WorkerError
from memladder.environments import interpreter
from memladder.meter.protocol import MAX_LINE, Order, encode

# The guard kills at once; a process stuck in a driver call may take its time to die.
_END_S = 40.0
_PYTHON = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


class GuardedWorker:
    """A worker process. When the `with` block is left, nothing that it started is alive.

    It starts with the interpreter of its framework. `variables` are added to this process's
    environment; `log` takes the worker's output.
    """

    def __init__(self, order: Order, variables: Mapping[str, str], log: Path) -> None:
        leash, self._leash = os.pipe()
        self._events, events = os.pipe()
        control, self._control = os.pipe()
        self._closing = threading.Lock()
        python = interpreter.chosen(order.jobs[0].case.framework)
        self._buffer = b""
        self.output_ended = False
        try:
            with log.open("ab") as output:
                self._guard = subprocess.Popen(
                    _command(python.python, control, events),
                    stdin=leash,
                    stdout=output,
                    stderr=output,
                    pass_fds=(control, events),
                    env={**python.environ(), **variables, **_PYTHON},
                    start_new_session=True,
                )
            for descriptor in (leash, events, control):
                os.close(descriptor)
            self._write(encode(order))
        except BaseException:
            # The guard ends when its leash does.
            os.close(self._leash)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
        try:
            self._guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise WorkerError(
                f"the processes below process {self._guard.pid} can't be ended"
            ) from None
        finally:
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
                self.ended_by_us = self._guard.poll() is None
                os.close(self._leash)
                self._leash = -1

    def status(self) -> int | None:
        """The worker's exit status, −N for signal N; None while anything of it is alive."""
        return self._guard.poll()

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

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._control, data) :]
            except BrokenPipeError:
                # The worker is gone; its exit status says more than this.
                return


def _command(python: Path, control: int, events: int) -> list[str]:
    """The guard runs in our interpreter, the worker in its framework's."""
    guard = [sys.executable, "-m", "memladder.meter.inside.guard", str(os.getpid()), str(control)]
    worker = [str(python), "-X", "faulthandler", "-m", "memladder.meter.inside.worker", str(events)]
    return guard + worker


def how_it_ended(status: int) -> str:
    """An exit status in words.

    >>> how_it_ended(3), how_it_ended(-11)
    ('exited with status 3', 'was ended by SIGSEGV')
    """
    if status >= 0:
        return f"exited with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
