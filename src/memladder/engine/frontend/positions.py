"""Masks, ALiBi and rotary positions, recognised by their numbers.

None of them is kept as a matrix: a mask becomes "causal" and a window, ALiBi a slope a head, rotary
tables a frequency a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# A score that is lower than this is masked; ALiBi stays above it.
_BLOCKED = -1e4
# Tables may have been rounded to bfloat16: 8 bits.
_ROUNDING = 2.0**-8


class PositionError(Exception):
    """Numbers by position that the engine does not know; who knows the operator names it."""


@dataclass(frozen=True)
class Bias:
    """What is added to attention's scores: what it masks, and ALiBi's slopes."""

    causal: bool = False
    window: int | None = None
    slopes: np.ndarray | None = None


def read_bias(added: np.ndarray) -> Bias:
    """`added` [heads or 1, queries or 1, keys] by its numbers.

    Raises PositionError if it is neither a causal mask, with or without a window, nor ALiBi, nor
    both.
    """
    heads, queries, keys = added.shape
    causal, window = _mask(added <= _BLOCKED, queries, keys)
    if not ((added != 0) & (added > _BLOCKED)).any():
        return Bias(causal, window)
    slopes = [_slope(np.asarray(added[h], np.float64), window or keys) for h in range(heads)]
    return Bias(causal, window, _as_published(np.array(slopes)))


def _mask(blocked: np.ndarray, queries: int, keys: int) -> tuple[bool, int | None]:
    if not blocked.any():
        return False, None
    if queries != keys or not all(np.array_equal(blocked[0], other) for other in blocked[1:]):
        raise PositionError("a mask that is not causal, or that differs between heads")
    distance = np.arange(queries)[:, np.newaxis] - np.arange(keys)
    seen = int(np.count_nonzero(~blocked[0, -1]))
    if not np.array_equal(blocked[0], (distance < 0) | (distance >= seen)):
        raise PositionError("a mask that is neither causal nor a window of the last tokens")
    return True, None if seen == keys else seen


def _slope(added: np.ndarray, window: int) -> float:
    """Of one head: [queries or 1, keys], a straight line by key, of any height a query."""
    queries, keys = added.shape
    places = np.arange(keys, dtype=np.float64)
    seen = np.ones((queries, keys), bool)
    if queries > 1:
        distance = np.arange(queries)[:, np.newaxis] - places
        seen = (distance >= 0) & (distance < window)
    last = seen[-1]
    if np.count_nonzero(last) < 2:
        return 0.0
    values, where = added[-1, last], places[last] - places[last].mean()
    slope = float(where @ values / (where @ where))
    line = np.where(seen, added - slope * places, 0.0)
    height = line.sum(axis=1, keepdims=True) / seen.sum(axis=1, keepdims=True)
    if np.abs(np.where(seen, line - height, 0.0)).max() > _ROUNDING * max(
        1.0, np.abs(values).max()
    ):
        raise PositionError("numbers added to attention's scores that are no ALiBi")
    return slope


def _as_published(slopes: np.ndarray) -> np.ndarray:
    """The slopes of the paper, if these are theirs but for rounding."""
    paper = alibi_slopes(len(slopes))
    found = paper if np.allclose(slopes, paper, rtol=_ROUNDING, atol=0) else slopes
    return found.astype(np.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """float64 [heads].

    Press et al. 2022, "Train Short, Test Long" (arXiv:2108.12409), section 3: the geometric series
    2^(-8/n), 2^(-16/n), …; where the heads are no power of two, the series of the next lower one,
    then every second of the next higher one.

    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.array(slopes)


@dataclass(frozen=True)
class Rotation:
    """order [head_dim]: the head's columns so that i is paired with i + head_dim / 2. frequencies
    [head_dim / 2], 0 for columns that stay as they are. scale: of all of them."""

    order: np.ndarray
    frequencies: np.ndarray
    scale: float


def read_rotation(indices: np.ndarray, factors: np.ndarray) -> Rotation:
    """Two columns of a head times numbers by position, added: a rotation, if it is one.

    indices [2, head_dim]: the columns of a head that are added; factors [2, seq_len, head_dim]. It
    does not matter which of the head's columns are paired (halves, neighbours), nor whether all
    are. Raises PositionError for what is no rotation, or none in proportion to the position.
    """
    dim = factors.shape[2]
    # cos 0 = 1 and sin 0 = 0: the first position tells which of the two is the column itself.
    own = np.abs(factors[:, 0]).argmax(axis=0)
    columns = np.arange(dim)
    cos, sin = factors[own, :, columns].T, factors[1 - own, :, columns].T
    partner = indices[1 - own, columns]
    if not np.array_equal(indices[own, columns], columns):
        raise PositionError("columns of a head that are moved and not rotated")
    turned = np.abs(sin).max(axis=0) > 0
    scale = float(np.median(np.hypot(cos, sin)[:, turned])) if turned.any() else 1.0
    if abs(scale - 1) < _ROUNDING / 4:
        scale = 1.0
    first = columns[turned & (columns < partner)]
    second = partner[first]
    loose = _ROUNDING * scale
    if (
        2 * len(first) != np.count_nonzero(turned)
        or not np.array_equal(partner[second], first)
        or np.abs(cos[:, first] - cos[:, second]).max(initial=0) > loose
        or np.abs(sin[:, first] + sin[:, second]).max(initial=0) > loose
        or np.abs(np.hypot(cos, sin) - np.where(turned, scale, 1)).max() > loose
        or (scale != 1.0 and not turned.all())
    ):
        raise PositionError("numbers by position that are no rotation")
    found = _frequencies(cos[:, first] / scale, -sin[:, first] / scale)
    rest = columns[~turned]
    half = len(rest) // 2
    order = np.concatenate((first, rest[:half], second, rest[half:]))
    return Rotation(order, np.concatenate((found, np.zeros(half))).astype(np.float32), scale)


def _frequencies(cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Radians a position from [seq_len, pairs]: from far positions, whose turns near ones count."""
    angles = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))
    found = angles[1]
    position = 2
    while position < len(angles):
        turns = np.round((found * position - angles[position]) / math.tau)
        found = (angles[position] + turns * math.tau) / position
        position *= 2
    found = _as_in_paper(found)
    places = np.arange(len(angles))[:, np.newaxis]
    off = np.abs(np.exp(1j * places * found) - (cos + 1j * sin)).max(initial=0)
    if off > 2 * _ROUNDING:
        raise PositionError("rotary positions that are not in proportion to the token's position")
    return found


def _as_in_paper(found: np.ndarray) -> np.ndarray:
    """base^(-i / pairs) for a whole number as base, if these are that but for rounding.

    Su et al. 2021 (arXiv:2104.09864), section 3.3: there the base is 10000.
    """
    pairs = len(found)
    if pairs < 2 or found.min() <= 0:
        return found
    for digits in (1, 2, 3):
        base = float(f"{found[1] ** -pairs:.{digits}g}")
        series = base ** (-np.arange(pairs) / pairs)
        if np.allclose(found, series, rtol=_ROUNDING / 4, atol=0):
            return np.asarray(series)
    return found
