"""Reading single fields of a `config.json`, so that a senseless one is one clear line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from memladder.core.errors import ConfigError

MAX_SIZE = 1 << 20
MAX_POSITIONS = 1 << 40
_LARGEST = sys.float_info.max


def _find(raw: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def size(raw: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """A whole number from 1 to MAX_SIZE under the first of `names` that is there."""
    value = _find(raw, names)
    if value is None:
        if default is None:
            raise ConfigError(f"{names[0]} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise ConfigError(
            f"{names[0]} {str(value)[:40]!r} is not a whole number from 1 to {MAX_SIZE}"
        )
    return value


def positions(raw: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number from 1 to MAX_POSITIONS: a number of positions sizes nothing in a layer."""
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_POSITIONS:
        raise ConfigError(
            f"{name} {str(value)[:40]!r} is not a whole number from 1 to {MAX_POSITIONS}"
        )
    return value


def positive(raw: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number above 0."""
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ConfigError(f"{name} {str(value)[:40]!r} is not a number above 0")
    return float(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """True or false; false where it is missing."""
    value = raw.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {str(value)[:40]!r} is not true or false")
    return value


def choice(raw: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    """One of `allowed`; the first where it is missing."""
    value = raw.get(name)
    if value is None:
        return allowed[0]
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} {str(value)[:40]!r} is not one of {', '.join(allowed)}")
    return value


def divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raise ConfigError unless `whole` is a multiple of `part`."""
    if whole % part:
        raise ConfigError(f"{whole_name} {whole} is not a multiple of {part_name} {part}")
