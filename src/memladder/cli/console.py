"""What every command tells the terminal: errors in one line, how it goes, and nothing forged."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from memladder.core.errors import MemladderError, UnavailableError
from memladder.core.text import shown

if TYPE_CHECKING:
    import typer
    from rich.console import Console

    from memladder.meter.outside.runner import Event

INTERRUPTED = 130
_LONG_S = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(application: typer.Typer, arguments: list[str]) -> NoReturn:
    """Run an application; every expected error is one line on stderr and exit status 2."""
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        code = application(args=arguments, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        # Libraries in C turn an interrupt into errors of their own.
        code = INTERRUPTED if came else _reported(error)
    if code == INTERRUPTED:
        # Some versions of typer turn the interrupt into this status themselves.
        say("memladder: stopped; what was finished is kept, the same command does the rest")
    sys.exit(code or 0)


def _reported(error: BaseException) -> int:
    """Say what an error means to the user; the exit status. One that is unexpected is raised."""
    match error:
        case UnavailableError():
            fail(f"{error}" + (f"; to get it: {error.hint}" if error.hint else ""))
        case MemladderError():
            fail(str(error))
        case BrokenPipeError():
            # The reader went away (`| head`): nothing left to say, and nobody to say it to.
            _silence(sys.stdout)
            return 0
        case OSError():
            fail(_told(error))
        case KeyboardInterrupt():
            return INTERRUPTED
    # typer's own errors share no importable base class across its versions.
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if hasattr(error, "format_message"):
        fail(" ".join(error.format_message().split()))
    raise error


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit status 2."""
    say(f"memladder: error: {shown(message)}")
    sys.exit(2)


def say(line: str) -> None:
    """A line on stderr, where there is one that takes it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


@contextmanager
def telling(name: str, console: Console) -> Iterator[Callable[[Event], None]]:
    """Tells on a console how the measuring of `name` goes: a live line on a terminal, elsewhere a
    line for each phase, and for each half minute of a long one."""
    began = told_at = time.monotonic()
    last: tuple[int, str] | None = None
    with console.status("starting") as status:

        def tell(event: Event) -> None:
            nonlocal last, told_at
            now = time.monotonic()
            line = f"{name}: {event}, {now - began:.0f} s"
            if console.is_terminal:
                status.update(line)
            elif (event.repeat, event.phase) != last or now - told_at > _LONG_S:
                last, told_at = (event.repeat, event.phase), now
                say(line)

        yield tell


def _told(error: OSError) -> str:
    """What a file, or standard output, could not do."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)
    return f"cannot write the output: {reason}" if error.errno in _FULL else reason


def _silence(stream: TextIO) -> None:
    """Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
