"""Where the command line prints: consoles as wide as numbers need, streams that take any text."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import TYPE_CHECKING

from memladder.core.units import mib

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 120
_PLAIN = "memladder.plain"
# What our own texts use beyond ASCII, as a typist writes it.
_LOOKS_LIKE = {
    "×": "x", "−": "-", "–": "-", "…": "...", "·": ".", "→": "->", "µ": "u", "‖": "||",
    "≤": "<=", "≥": ">=", "±": "+-", "²": "2", "√": "sqrt", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


def plain_console(stderr: bool = False) -> Console:
    """A console that prints text as it is: `memladder[pytorch]` is no markup.

    Where nobody's terminal sets the width, tables have room for their numbers.
    """
    from memladder.cli.terminal import PlainConsole

    found = PlainConsole(stderr=stderr, markup=False, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = max(found.width, _WIDTH)
    return found


def print_json(found: object) -> None:
    """Print as JSON."""
    print(json.dumps(found, indent=1))


def mib_text(size: int) -> str:
    """Bytes as MiB with one digit: `1,632.0`."""
    return f"{mib(size):,.1f}"


def take_any_text() -> None:
    """Let stdout and stderr take every text: what their encoding lacks is written in ASCII.

    An ASCII terminal, or a pipe under PYTHONIOENCODING, refuses `×`; every encoding refuses a file
    name that is no text.
    """
    codecs.register_error(_PLAIN, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_letter, error.object[error.start : error.end])), error.end


def _letter(letter: str) -> str:
    if "\u2800" <= letter <= "\u28ff":
        # A spinner's dots.
        return "*"
    return _LOOKS_LIKE.get(letter) or letter.encode("ascii", "backslashreplace").decode()
