"""Masks, ALiBi and rotary positions, recognised by their numbers.

None of them is kept as a matrix: a mask becomes "causal" and a window, ALiBi a slope a head, rotary
tables a frequency a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

# A score that is lower than this is masked; ALiBi stays above it.
_BLOCKED = -1e4
# After a factor, which the scores' own range has as well, and with ALiBi added.
_STILL_BLOCKED = -1e3
# float32: frequencies, rounded, times a position, rounded.
_ANGLE = 2.0**-21


class PositionError(Exception):
    """Numbers by position that the engine does not know; who knows the operator names it."""


@dataclass(frozen=True)
class Bias:
    """An addend of attention's scores: what it masks, with `floor` at the most, and ALiBi's
    slopes. All else that is added lies within `lift`."""

    causal: bool = False
    window: int | None = None
    slopes: np.ndarray | None = None
    floor: float = -math.inf
    lift: float = 0.0

    def times(self, factor: float) -> Bias:
        """What it is of scores that are multiplied. Raises PositionError for a mask no more."""
        floor = self.floor * factor
        if factor <= 0 or floor > _STILL_BLOCKED:
            raise PositionError(f"a mask of {self.floor:g} times {factor:g}")
        slopes = None if self.slopes is None else self.slopes * np.float32(factor)
        return replace(self, slopes=slopes, floor=floor, lift=self.lift * factor)


def read_bias(added: np.ndarray) -> Bias:
    """`added` [heads or 1, queries or 1, keys] by its numbers.

    Raises PositionError if it is neither a causal mask, with or without a window, nor ALiBi, nor
    both.
    """
    heads, queries, keys = added.shape
    blocked = added <= _BLOCKED
    causal, window = _mask(blocked, queries, keys)
    floor = float(added[blocked].max(initial=-math.inf))
    if not added[~blocked].any():
        return Bias(causal, window, None, floor)
    lines = [_Line(np.asarray(added[h], np.float64), window or keys) for h in range(heads)]
    slopes = np.array([line.slope() for line in lines])
    paper = alibi_slopes(heads)
    if all(line.has(slope) for line, slope in zip(lines, paper, strict=True)):
        slopes = paper
    lift = float(np.ptp(added[~blocked]))
    return Bias(causal, window, slopes.astype(np.float32), floor, lift)


def still_masked(biases: Sequence[Bias]) -> bool:
    """Does what one of them masks stay masked with all others added?"""
    floor = max((bias.floor for bias in biases), default=-math.inf)
    return floor + sum(bias.lift for bias in biases) <= _STILL_BLOCKED


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


class _Line:
    """Of one head, added [queries or 1, keys]: a straight line by key, of any height a query, where
    queries see keys."""

    def __init__(self, added: np.ndarray, window: int) -> None:
        queries, keys = added.shape
        self.added, self.places = added, np.arange(keys, dtype=np.float64)
        self.seen = np.ones((queries, keys), bool)
        if queries > 1:
            distance = np.arange(queries)[:, np.newaxis] - self.places
            self.seen = (distance >= 0) & (distance < window)
        numbers = added[self.seen]
        self.loose = _rounding(numbers) * max(1.0, float(np.abs(numbers).max()))

    def slope(self) -> float:
        """By the last query. Raises PositionError where the line is not straight."""
        last = self.seen[-1]
        found = 0.0
        if np.count_nonzero(last) > 1:
            where = self.places[last] - self.places[last].mean()
            found = float(where @ self.added[-1, last] / (where @ where))
        if not self.has(found):
            raise PositionError("numbers added to attention's scores that are no ALiBi")
        return found

    def has(self, slope: float) -> bool:
        """Is it that line within rounding?"""
        line = np.where(self.seen, self.added - slope * self.places, 0.0)
        height = line.sum(axis=1, keepdims=True) / self.seen.sum(axis=1, keepdims=True)
        return bool(np.abs(np.where(self.seen, line - height, 0.0)).max() <= self.loose)


def _rounding(table: np.ndarray) -> float:
    """How far a number of the table is from what was meant, relative: 2^-8 where all are bfloat16,
    2^-11 where all are float16."""
    fraction, exponent = np.frexp(np.asarray(table, np.float64))
    for bits in (8, 11):
        rounded = np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits)
        if np.allclose(rounded, table, rtol=1e-6, atol=0):
            return float(2.0**-bits)
    return float(2.0**-20)


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
    are. Raises PositionError for no rotation, or one out of proportion to the position.
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
    rounding = _rounding(factors)
    scale = float(np.median(np.hypot(cos, sin)[:, turned])) if turned.any() else 1.0
    if abs(scale - 1) < rounding / 4:
        scale = 1.0
    first = columns[turned & (columns < partner)]
    second = partner[first]
    loose = rounding * scale
    if (
        2 * len(first) != np.count_nonzero(turned)
        or not np.array_equal(partner[second], first)
        or np.abs(cos[:, first] - cos[:, second]).max(initial=0) > loose
        or np.abs(sin[:, first] + sin[:, second]).max(initial=0) > loose
        or np.abs(np.hypot(cos, sin) - np.where(turned, scale, 1)).max() > loose
        or (scale != 1.0 and not turned.all())
    ):
        raise PositionError("numbers by position that are no rotation")
    found = _frequencies(cos[:, first] / scale, -sin[:, first] / scale, rounding)
    rest = columns[~turned]
    half = len(rest) // 2
    order = np.concatenate((first, rest[:half], second, rest[half:]))
    return Rotation(order, np.concatenate((found, np.zeros(half))).astype(np.float32), scale)


def _frequencies(cos: np.ndarray, sin: np.ndarray, rounding: float) -> np.ndarray:
    """Radians a position from [seq_len, pairs]: from far positions, whose turns near ones count."""
    turned = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    if len(turned) < 2:
        raise PositionError("rotary positions of one token, which is not at position 0")
    angles = np.angle(turned)
    found = angles[1]
    position = 2
    while position < len(angles):
        turns = np.round((found * position - angles[position]) / math.tau)
        found = (angles[position] + turns * math.tau) / position
        position *= 2
    # The straight line through what all positions are off.
    places = np.arange(len(turned), dtype=np.float64)
    off = np.angle(turned * np.exp(-1j * np.outer(places, found)))
    found = found + places @ off / (places @ places)
    found = next((series for series in _series(found) if _fits(series, turned, rounding)), found)
    if not _fits(found, turned, 2 * rounding):
        raise PositionError("rotary positions that are not in proportion to the token's position")
    return found


def _fits(frequencies: np.ndarray, turned: np.ndarray, rounding: float) -> bool:
    """Do the frequencies make the positions' turns [seq_len, pairs], within rounding?"""
    angles = np.outer(np.arange(len(turned)), frequencies)
    return bool((np.abs(np.exp(1j * angles) - turned) <= rounding + _ANGLE * np.abs(angles)).all())


def _series(found: np.ndarray) -> Iterator[np.ndarray]:
    """base^(-i / pairs) for a whole number of few digits as base, the fewest first.

    Su et al. 2021 (arXiv:2104.09864), section 3.3: there the base is 10000.
    """
    pairs = len(found)
    if pairs < 2 or found.min() <= 0:
        return
    for digits in range(1, 7):
        base = float(f"{found[1] ** -pairs:.{digits}g}")
        yield base ** (-np.arange(pairs) / pairs)
