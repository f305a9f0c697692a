"""The numbers that Figure 11 of the Ladder paper (OSDI'24) shows, and its scripts' rerun logged.

They ship with the package and are only ever read. Importing this needs the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from memladder.core import serial


@dataclass(frozen=True)
class Published:
    """Values by case id, in MiB. `invalid` says why an id of the rerun has no value."""

    about: str
    device: str
    kind: str
    values: Mapping[str, int]
    invalid: Mapping[str, str]


@dataclass(frozen=True)
class _Invalid:
    value: int
    reason: str


@dataclass(frozen=True)
class _File:
    about: str
    unit: str
    device: str
    kind: str
    values: Mapping[str, int]
    invalid: Mapping[str, _Invalid]


@cache
def published() -> Published:
    """What the paper's figure shows, measured by its authors on an A100."""
    return _load("figure11_published_a100.json")


@cache
def rerun() -> Published:
    """What the paper's own scripts logged on an A100 in May 2024."""
    return _load("figure11_rerun_a100.json")


def _load(name: str) -> Published:
    text = resources.files(__package__).joinpath("data", name).read_text(encoding="utf-8")
    data: dict[str, Any] = {"invalid": {}, **json.loads(text)}
    file = serial.from_json(_File, data, name)
    if file.unit != "MiB":
        raise ValueError(f"{name}: unit {file.unit!r} is not MiB")
    return Published(
        file.about,
        file.device,
        file.kind,
        MappingProxyType(dict(file.values)),
        MappingProxyType({case_id: item.reason for case_id, item in file.invalid.items()}),
    )
