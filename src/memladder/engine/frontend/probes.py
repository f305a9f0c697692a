"""Telling functions and norms by their values, as far as float16 reaches.

A few probes choose the nearest of a table; many then have to agree: all numbers of float16 for a
function of one element, rows of all magnitudes and shapes for a norm. A clamp that acts anywhere
among them makes another function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from memladder.kernels.functions import FUNCTIONS

Function: TypeAlias = Callable[[Tensor], Tensor]
Key = TypeVar("Key")

# Numbers of a model in float16 are rounded to 11 bits: tanh's and erf's GELU, 5e-4 apart, are told
# apart by which of them is nearer.
_NEAR = 1e-3
# Where a function has a kink, it is at a number that is meant.
_EXACT = 1e-6
# float32's exponential overflows, and a model that spells it out may give no number.
_OVERFLOW = 88.0
_MOST = float(np.finfo(np.float16).max)


def nearest_function(found: Function, names: Sequence[str], *, kinked: bool) -> str | None:
    """Which of `FUNCTIONS` it is, of the names; None if it is none of these.

    `found` takes float64 [probes, 1] to the same; `kinked` if it is spelled with functions that
    have a kink.
    """
    near, values = _known(names)
    best = _nearest(found(near), values)
    if best is None:
        return None
    probe, values = _known((best,), everywhere=True)
    made, wanted = found(probe), values[best]
    overflown = ~made.isfinite() & (probe.abs() > _OVERFLOW)
    made = made.where(~overflown, wanted)
    if kinked:
        # Nothing is small enough to be left out: it may be what a norm is divided by.
        return best if torch.allclose(made, wanted, rtol=_EXACT, atol=0) else None
    return best if _error(made, wanted) <= _NEAR else None


def nearest_of_rows(
    found: Function, known: Mapping[Key, Function], columns: int, numbers: Iterable[float]
) -> Key | None:
    """The key of the function of whole rows that it is; None if it is none of these.

    All take float64 [rows, columns] to the same. Near the `numbers`, those that it is spelled
    with, there are more rows.
    """
    worst = dict.fromkeys(known, 0.0)
    for probe in _rows(columns, numbers):
        made = found(probe)
        worst = {key: max(worst[key], _error(made, known[key](probe))) for key in worst}
        worst = {key: error for key, error in worst.items() if error <= _NEAR}
        if not worst:
            return None
    return min(worst, key=lambda key: worst[key])


@cache
def _known(names: Sequence[str], everywhere: bool = False) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Probes [n, 1], some or all of float16, and what the functions make of them."""
    if everywhere:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
        probe = torch.from_numpy(halves[np.isfinite(halves)])
    else:
        probe = torch.linspace(-9, 9, 577, dtype=torch.float64)
    probe = probe.unsqueeze(1)
    return probe, {name: torch.from_numpy(FUNCTIONS[name](probe.numpy())) for name in names}


def _random(columns: int, sizes: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(sizes), columns, generator=generator, dtype=torch.float64)
    return ((values + 0.5) * sizes.unsqueeze(1)).clamp(-_MOST, _MOST)


def _rows(columns: int, numbers: Iterable[float]) -> Iterator[Tensor]:
    """A few magnitudes, the smallest near the root of a norm's epsilon. Then all, and more of them
    near the numbers, their roots and squares: even rows, rows with one number that is larger than
    the others or alone, and zeros."""
    yield _random(columns, torch.logspace(-3.5, 1, 10, dtype=torch.float64))
    near = [f(abs(n)) for n in numbers for f in (float, math.sqrt, lambda n: n * n)]
    sizes = [*np.logspace(-6, math.log10(_MOST), 45)]
    sizes += [n * f for n in near for f in (0.5, 0.9, 1.1, 2.0) if 1e-6 < n * f <= _MOST]
    size = torch.tensor(sizes, dtype=torch.float64)
    rows = _random(columns, size)
    yield rows
    even = rows.sign() * size.unsqueeze(1)
    yield even
    rows[:, 0] *= torch.logspace(1, 4, len(size), dtype=torch.float64)
    yield rows.clamp(-_MOST, _MOST)
    rows[:, 1:] = 0
    rows[:, 0] = size
    yield rows
    yield -rows
    yield torch.zeros_like(rows[:1])


def _error(found: Tensor, wanted: Tensor) -> float:
    """The greatest error, relative for values above 1; infinite where only one is a
    number."""
    if found.shape != wanted.shape:
        return math.inf
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    errors = ((found - wanted).abs() / (1 + wanted.abs())).nan_to_num(math.inf)
    return float(errors.where(~same, 0.0).max())


def _nearest(found: Tensor, known: Mapping[Key, Tensor]) -> Key | None:
    errors = {key: _error(found, values) for key, values in known.items()}
    best = min(errors, key=lambda key: errors[key], default=None)
    return best if best is not None and errors[best] <= _NEAR else None
