"""Which of a kernel's cuts is taken for a class of shapes: the shipped one, or the fastest measured.

A kernel names its candidates for a class, the shipped default first. What `memladder tune` found on
a GPU is kept in one JSON file per GPU and version of Triton and memladder in the cache folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Cut = TypeVar("Cut")

_chosen: dict[tuple[str, str], int] = {}
_asked: dict[tuple[str, str], int] = {}


def choice(kernel: str, shape_class: str, candidates: Sequence[Cut]) -> Cut:
    """One of the candidates; the first, unless another was measured to be faster here."""
    key = kernel, shape_class
    _asked[key] = len(candidates)
    return candidates[min(_chosen.get(key, 0), len(candidates) - 1)]
