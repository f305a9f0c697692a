"""The guard: a tiny process between runner and worker that leaves nothing running behind.

    python -m memladder.meter.inside.guard RUNNER_PID CONTROL_FD PROGRAM ARGUMENT...

It is the subreaper of all that the worker starts, so a descendant that forked twice or opened a
session of its own still ends up here. Its standard input is a leash: when the runner lets go, by
closing it or by dying, everything below the guard is killed. When the worker ends, leftovers are
killed and the worker's exit status, or its signal, becomes the guard's own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from memladder.core.processes import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, descendants, prctl

_LEASH = 0
_GIVE_UP_S = 30.0
_TOLD_TO_END = 128 + signal.SIGTERM
_NOT_OURS = (signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Start the worker and stay until it, and everything that it started, is gone."""
    runner, control = int(arguments[0]), int(arguments[1])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # The leash alone would not do if the runner had forked: a copy of its end would stay open.
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    wake = _wake_on_signals()
    if os.getppid() != runner:
        return _TOLD_TO_END
    worker = _spawn(arguments[2:], control)
    os.close(control)
    status = _wait(worker, wake)
    _end_all()
    if status is None:
        return _TOLD_TO_END
    if os.WIFSIGNALED(status):
        _die_of(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


_told: list[int] = []


def _wake_on_signals() -> int:
    wake, wake_end = os.pipe()
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end)
    signal.signal(signal.SIGCHLD, _ignore)
    signal.signal(signal.SIGTERM, _note)
    # What a terminal or a parent sends to everybody is the runner's to heed.
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    return wake


def _ignore(*_: object) -> None:
    """A handler is needed for the wake-up; the reaping is done in the loop."""


def _note(number: int, _: FrameType | None) -> None:
    _told.append(number)


def _spawn(command: list[str], control: int) -> int:
    """Fork and execute the worker, with `control` as its standard input; returns its pid."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _NOT_OURS:
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() != guard:
            os._exit(_TOLD_TO_END)
        # When host memory runs out, the kernel shall take the worker first.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.dup2(control, 0)
        os.execv(command[0], command)  # noqa: S606
    except BaseException as error:
        sys.stderr.write(f"{command[0]} can't be started: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(127)


def _wait(worker: int, wake: int) -> int | None:
    """Wait for the worker; its wait status, or None when the runner let go or SIGTERM came."""
    while True:
        ready, _, _ = select.select([_LEASH, wake], [], [])
        if _LEASH in ready or _told:
            return None
        os.read(wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == worker:
                    return status
                if pid == 0:
                    break


def _end_all() -> None:
    """Kill and reap until nothing is left; whoever is orphaned meanwhile lands here again."""
    deadline = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _die_of(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The C library keeps two to itself.
    if number != signal.SIGKILL and number in signal.valid_signals():
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
