"""How every command ends: errors in one line, interrupts too."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from memladder.cli.console import take_any_text
from memladder.core.errors import MemladderError, UnavailableError
from memladder.core.text import shown

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(application: typer.Typer, arguments: list[str]) -> NoReturn:
    """Run an application; every expected error is one line on stderr and exit status 2."""
    take_any_text()
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
    say(f"memladder: error: {message}")
    sys.exit(2)


def say(line: str) -> None:
    """A line on stderr, where there is one that takes it; nothing in it is obeyed."""
    try:
        print(shown(line), file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


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


@contextmanager
def needed(command: str, extra: str) -> Iterator[None]:
    """A library that is not here is one line that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{command} needs {error.name}", f"pip install 'memladder[{extra}]'"
        ) from None
