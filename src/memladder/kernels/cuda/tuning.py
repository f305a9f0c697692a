"""How a kernel is cut for a class of shapes: as shipped, or the fastest that was measured here.

A kernel names its candidates for a class, the shipped default first. What `memladder tune` found is
kept in a file per GPU and version, and taken by whoever asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton

from memladder.core import digests
from memladder.core.errors import CacheError
from memladder.models import cache

Cut = TypeVar("Cut")

# By kernel and class; a cut by its text.
_preferred: dict[str, str] = {}
_asked: dict[str, tuple[str, ...]] = {}


def choice(kernel: str, shape_class: str, candidates: Sequence[Cut]) -> Cut:
    """One of the candidates: the first, unless another one is preferred."""
    key = f"{kernel} {shape_class}"
    texts = tuple(map(repr, candidates))
    _asked[key] = texts
    wanted = _preferred.get(key)
    return candidates[texts.index(wanted) if wanted in texts else 0]


def asked() -> Mapping[str, tuple[str, ...]]:
    """The candidates of every choice that was made in this process."""
    return dict(_asked)


def preferred() -> Mapping[str, str]:
    """The cuts preferred to the shipped defaults."""
    return dict(_preferred)


def prefer(cuts: Mapping[str, str]) -> None:
    """Prefer these cuts from now on, and no others."""
    _preferred.clear()
    _preferred.update(cuts)


def path(cache_dir: Path, version: str) -> Path:
    """The file for PyTorch's current GPU, this Triton and that version of memladder."""
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    return cache_dir / "tuning" / f"{gpu}-triton-{triton.__version__}-memladder-{version}.json"


def load(file: Path) -> bool:
    """Prefer what the file says; whether there is one. Raises CacheError if it is damaged."""
    if not file.exists():
        prefer({})
        return False
    cache.require_ours(file)
    damage = digests.fault(file)
    if damage is not None:
        raise CacheError(f"{file} {damage}; `memladder tune` makes it anew")
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{file} can't be read: {error}; `memladder tune` makes it anew") from None
    if not isinstance(found, dict) or not all(isinstance(cut, str) for cut in found.values()):
        raise CacheError(f"{file} is damaged; `memladder tune` makes it anew")
    prefer(found)
    return True


def save(file: Path) -> None:
    """Keep the preferred cuts. Raises CacheError where the file can't be written."""
    with cache.writing(file.parent), cache.replacing(file) as part:
        part.write_text(json.dumps(_preferred, indent=1, sort_keys=True) + "\n", encoding="utf-8")
