"""Text of others: cleaned where it comes in, escaped where it is shown.

What a worker, a record, a driver or a file name says may hold anything: line breaks that forge
lines, and escape sequences that a terminal obeys (ECMA-48). Standard library only.
"""

from __future__ import annotations

import re
from typing import Any

MAX_TEXT = 2000
# ECMA-48: CSI and its final byte; strings (OSC, DCS, SOS, PM, APC) to their terminator; the rest.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)


def clean(text: str, limit: int = MAX_TEXT) -> str:
    r"""One line of at most `limit` characters, without escapes, controls and format characters.

    >>> clean("\x1b[31mred\x1b[0m\n and\tmore\u202e\x00")
    'red and more'
    """
    words = _SEQUENCE.sub("", text[: 8 * limit]).split()
    found = "".join(c for c in " ".join(words) if c.isprintable())
    return found if len(found) <= limit else found[: limit - 1] + "…"


def cleaned(data: Any) -> Any:
    """JSON values with every text in them, keys included, cleaned."""
    if isinstance(data, str):
        return clean(data)
    if isinstance(data, list):
        return [cleaned(item) for item in data]
    if isinstance(data, dict):
        return {clean(key): cleaned(item) for key, item in data.items()}
    return data


def shown(text: object) -> str:
    r"""Text as it may be printed: other characters are written as Python would escape them.

    >>> shown("a\x1b[2J\nb é×")
    'a\\x1b[2J\\nb é×'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
