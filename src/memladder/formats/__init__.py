"""Number formats: one file a format; the file's name is its key, and this folder is the only list.

A file defines `FORMAT`, a frozen dataclass whose fields are the format's parameters. A format is
written as its key, followed by what differs from the defaults: `int4`, `fp8:element=e5m2`,
`int4:group_size=64,zero_point=true`.

Listing the formats loads none of them; a format's file imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.core.errors import FormatError
from memladder.core.folders import entries

if TYPE_CHECKING:
    from memladder.formats._shared.base import Format

_FLAGS = {"true": True, "false": False}


def names() -> tuple[str, ...]:
    """Keys of all formats, sorted."""
    return entries(__path__)


@cache
def literal(name: str, attribute: str) -> bool | int | str:
    """A class attribute of a format that is written as a literal, read from its file, or else from
    `Format`'s, without importing it: torch would come along.

    >>> literal("int1", "activation"), literal("int4", "activation")
    ('int8', 'fp16')
    """
    folder = Path(__file__).parent
    for path in (folder / f"{name}.py", folder / "_shared" / "base.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Name) and one.id == attribute for one in targets):
                assert node.value is not None
                found: bool | int | str = ast.literal_eval(node.value)
                return found
    raise AttributeError(f"{name}: no format says {attribute}")


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
