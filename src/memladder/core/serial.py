"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or mistyped field is an error.
Only a field whose default is None may be missing: it is younger than some files.

JSON is read by nothing but this, so that a foreign or damaged file can never become a number.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """What `enum` has since Python 3.11; workers also run on 3.10."""

        __str__ = str.__str__


__all__ = ["StrEnum", "from_json", "to_json"]

T = TypeVar("T")


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
    return value


def from_json(kind: type[T], data: Any, where: str = "$") -> T:
    """JSON values as `kind`. Raises ValueError naming the place that does not fit."""
    return _read(kind, data, where)  # type: ignore[no-any-return]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), data, where)
    if origin is tuple:
        return _read_tuple(get_args(kind), data, where)
    if origin is not None and issubclass(origin, Mapping):
        item = get_args(kind)[1]
        _expect(isinstance(data, dict), data, "an object", where)
        return {key: _read(item, value, f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if issubclass(kind, StrEnum):
        _expect(data in list(kind), data, f"one of {', '.join(kind)}", where)
        return kind(data)
    if kind is float:
        _expect(
            isinstance(data, (int, float)) and not isinstance(data, bool), data, "a number", where
        )
        return float(data)
    _expect(type(data) is kind, data, kind.__name__, where)
    return data


def _read_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], data, where)
    _expect(any(type(data) is kind for kind in rest), data, "a scalar", where)
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
    names = {f.name for f in dataclasses.fields(kind)}
    needed = {f.name for f in dataclasses.fields(kind) if not _may_lack(f)}
    missing, unknown = sorted(needed - set(data)), sorted(set(data) - names)
    if missing or unknown:
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], data[name], f"{where}.{name}") for name in data})


def _may_lack(field: dataclasses.Field[Any]) -> bool:
    """A field that may be None by default came later than files that lack it."""
    return field.default is None


def _expect(holds: bool, data: Any, wanted: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {str(data)[:60]!r} is not {wanted}")
