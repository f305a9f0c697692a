"""Where a command begins: a signal ends it in one line, also while modules are still imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_SOON_S = 0.02


def main() -> None:
    """`memladder`."""
    _run("main")


def run_all() -> None:
    """`run_all.py`."""
    _run("run_all")


def measure_memory() -> None:
    """`measure_memory.py`."""
    _run("measure_memory")


def _run(name: str) -> None:
    _heed_signals()
    try:
        from memladder.cli import main

        getattr(main, name)()
    except KeyboardInterrupt:
        _leave()
    finally:
        for number in _ENDING:
            # Nobody is left to catch an interrupt while Python ends.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def _heed_signals() -> None:
    """Until the command itself takes over there is nothing to clean up."""
    for number in _ENDING:
        # What `nohup` or a shell in the background told us to ignore stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    sys.unraisablehook = _unraisable


def _leave(*_: object) -> NoReturn:
    try:
        os.write(2, b"memladder: stopped\n")
    finally:
        os._exit(_INTERRUPTED)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """An interrupt inside a finaliser would be printed and lost: it comes again soon."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _SOON_S)
    else:
        sys.__unraisablehook__(found)


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
