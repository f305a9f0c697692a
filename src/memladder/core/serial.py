"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or mistyped field is an error.
Only a field that is younger than some files may be missing: its default is None, or `younger`.

JSON is read by nothing but this, so that a foreign or damaged file can never become a number.
Numbers, texts and depth are bounded as they are read: `MAX_INT`, `MAX_TEXT`, `MAX_DEPTH`. A float
is finite; one that need not be is annotated `AnyFloat`, and is a text in JSON, which has no NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import (
    Annotated,
    Any,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """What `enum` has since Python 3.11; workers also run on 3.10."""

        __str__ = str.__str__


__all__ = ["AnyFloat", "StrEnum", "dumps", "from_json", "loads", "to_json", "younger"]

T = TypeVar("T")

MAX_INT = (1 << 63) - 1
MAX_TEXT = 1 << 16
MAX_DEPTH = 32

AnyFloat = Annotated[float, "NaN and infinities too"]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any) -> Any:
    """A dataclass (or a tuple, mapping or scalar of them) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def dumps(value: Any, **options: Any) -> str:
    """JSON text of what `to_json` takes; `options` are `json.dumps`'s."""
    return json.dumps(to_json(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """JSON values of a text by RFC 8259: no NaN, no name twice. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} is there twice in one object")
    return found


def from_json(kind: type[T], data: Any, where: str = "$") -> T:
    """JSON values as `kind`. Raises ValueError naming the place that does not fit."""
    return _read(kind, data, where)  # type: ignore[no-any-return]


def younger(default: Any) -> Any:
    """A field with a default, which files from before it lack."""
    return dataclasses.field(default=default, metadata={"younger": True})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _read(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if kind is Any:
        _bound(data, where)
        return data
    origin = get_origin(kind)
    if origin is Annotated:
        named = isinstance(data, str) and data in _NOT_FINITE
        return _NOT_FINITE[data] if named else _read(float, data, where)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), data, where)
    if origin is tuple:
        return _read_tuple(get_args(kind), data, where)
    if origin is not None and issubclass(origin, Mapping):
        item = get_args(kind)[1]
        _expect(isinstance(data, dict), data, "an object", where)
        for key in data:
            _bound(key, where)
        return {key: _read(item, value, f"{where}.{key}") for key, value in data.items()}
    if issubclass(kind, StrEnum):
        _expect(data in list(kind), data, f"one of {', '.join(kind)}", where)
        return kind(data)
    if kind is float:
        _expect(
            isinstance(data, (int, float)) and not isinstance(data, bool), data, "a number", where
        )
        _bound(data, where)
        return float(data)
    _expect(type(data) is kind, data, kind.__name__, where)
    _bound(data, where)
    return data


def _read_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], data, where)
    _expect(any(type(data) is kind for kind in rest), data, "a scalar", where)
    _bound(data, where)
    return data


def _read_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), data, "a list", where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _expect(len(data) == len(kinds), data, f"a list of {len(kinds)}", where)
    return tuple(
        _read(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, "an object", where)
    if (numbers := _numbers(kind)) and _are_numbers(data, numbers):
        return kind(**data)
    names, needed = _field_names(kind)
    if not needed <= data.keys() <= names:
        missing, unknown = sorted(needed - data.keys()), sorted(data.keys() - names)
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], data[name], f"{where}.{name}") for name in data})


@cache
def _numbers(kind: Any) -> dict[str, tuple[type, ...]]:
    """The types of each field, where all are numbers: most of a record are its trace's points.
    Empty for any other dataclass."""
    found = {name: get_args(hint) or (hint,) for name, hint in _hints(kind).items()}
    allowed = {int, float, type(None)}
    return found if all(allowed.issuperset(kinds) for kinds in found.values()) else {}


def _are_numbers(data: dict[str, Any], numbers: dict[str, tuple[type, ...]]) -> bool:
    """Has it all of these fields, and no other, each of its type and within the bounds?"""
    if data.keys() != numbers.keys():
        return False
    for name, value in data.items():
        if type(value) not in numbers[name] or (
            value is not None and not -MAX_INT <= value <= MAX_INT
        ):
            return False
    return True


@cache
def _field_names(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """All fields of a dataclass, and those that a file may not lack."""
    fields = dataclasses.fields(kind)
    return (
        frozenset(field.name for field in fields),
        frozenset(field.name for field in fields if not _may_lack(field)),
    )


def _bound(data: Any, where: str) -> None:
    """Raise ValueError for a value of JSON, however deep, that is beyond the bounds."""
    todo = [(data, MAX_DEPTH)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, str):
            _expect(len(value) <= MAX_TEXT, value, f"of {MAX_TEXT} characters at most", where)
            _expect(_is_text(value), ascii(value), "text", where)
        elif isinstance(value, int):
            if abs(value) > MAX_INT:
                # Not shown: Python refuses to write out the largest.
                raise ValueError(f"{where}: an integer is beyond 2^63")
        elif isinstance(value, float):
            _expect(math.isfinite(value), value, "a finite number", where)
        elif isinstance(value, (dict, list)):
            if not depth:
                raise ValueError(f"{where}: it is nested more than {MAX_DEPTH} deep")
            inner = value if isinstance(value, list) else [*value, *value.values()]
            todo += [(item, depth - 1) for item in inner]


def _is_text(value: str) -> bool:
    """Has it no half of a surrogate pair, which no encoding takes?"""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _may_lack(field: dataclasses.Field[Any]) -> bool:
    """Is the field younger than files that lack it?"""
    return field.default is None or "younger" in field.metadata


def _expect(holds: bool, data: Any, wanted: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {_short(data)} is not {wanted}")


def _short(data: Any) -> str:
    if isinstance(data, int) and abs(data) > MAX_INT:
        return "a huge integer"
    if isinstance(data, (dict, list)):
        return f"a {'list' if isinstance(data, list) else 'object'} of {len(data)}"
    return repr(str(data)[:60])
