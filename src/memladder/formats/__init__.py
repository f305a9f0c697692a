"""Number formats: one file a format; the file's name is its key, and this folder is the only list.

A file defines `FORMAT`, a frozen dataclass whose fields are the format's parameters. A format is
written as its key, followed by what differs from the defaults: `int4`, `fp8:element=e5m2`,
`int4:group_size=64,zero_point=true`.

Listing the formats loads none of them; a format's file imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

from memladder.core.errors import FormatError
from memladder.core.folders import entries

if TYPE_CHECKING:
    from memladder.formats._shared.base import Format

ACTIVATIONS = {"fp8": "fp8", "mxfp8": "mxfp8", "int1": "int8"}
"""Weight formats whose products take activations in a format of their own; all others take fp16."""

_FLAGS = {"true": True, "false": False}


def names() -> tuple[str, ...]:
    """Keys of all formats, sorted."""
    return entries(__path__)


def get(text: str) -> Format:
    """The format that `text` names, with its parameters. Raises FormatError.

    >>> str(get("fp8:scale=float16,element=e5m2"))
    'fp8:element=e5m2,scale=float16'
    """
    name, _, options = text.strip().partition(":")
    if name not in names():
        raise FormatError(f"unknown format {name[:40]!r}; known: {', '.join(names())}")
    kind = importlib.import_module(f"{__name__}.{name}").FORMAT
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            known = f"its parameters: {', '.join(defaults)}" if defaults else "it has none"
            raise FormatError(f"format {name} has no parameter {key[:40]!r}; {known}")
        if key in given:
            raise FormatError(f"format {name}: {key} is given twice; give it once")
        given[key] = _value(f"{name}: {key}", value, defaults[key])
    found: Format = kind(**given)
    return found


def _value(what: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text not in _FLAGS:
            raise FormatError(f"{what} {text[:40]!r} is not true or false")
        return _FLAGS[text]
    if isinstance(default, int):
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise FormatError(f"{what} {text[:40]!r} is not a whole number")
        return int(text)
    return text
