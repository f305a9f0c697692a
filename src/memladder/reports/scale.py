"""The logarithmic axis in numbers: MiB to points and back, round limits, plain tick labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_RANGE = (400.0, 80_000.0)
_STEPS = (1, 2, 5)
_DIGIT_ROOM = 6.0
"""Points for one digit of a tick label, its part of the gap to the next label included."""


@dataclass(frozen=True)
class Scale:
    """An axis from `lower` to `upper` MiB, `width` points wide."""

    lower: float
    upper: float
    width: float

    @property
    def _points_per_decade(self) -> float:
        return self.width / math.log10(self.upper / self.lower)

    def points(self, value: float) -> float:
        """Where a value stands, in points from the axis's left end."""
        return self._points_per_decade * math.log10(value / self.lower)

    def value(self, points: float) -> float:
        """The value at a place, the inverse of `points`."""
        return float(self.lower * 10 ** (points / self._points_per_decade))

    @classmethod
    def fit(cls, extents: Sequence[tuple[float, float]], width: float) -> Scale:
        """An axis that holds every value with its own points to spare behind it.

        >>> Scale.fit([(534, 20), (64718, 40)], 300).lower
        400.0
        """
        if not extents:
            return cls(*DEFAULT_RANGE, width)
        lower = _below(0.85 * min(value for value, _ in extents))
        upper = max(lower * (value / lower) ** (width / (width - room)) for value, room in extents)
        return cls(lower, max(upper, 10 * lower), width)

    def ticks(self) -> list[float]:
        """Where numbers stand: 1, 2 and 5 of each decade, or only whole decades if those touch.

        >>> Scale(400, 50_000, 300).ticks()
        [500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0]
        """
        ticks = self._multiples(_STEPS)
        room = _DIGIT_ROOM * len(tick_label(ticks[-1]))
        if self._points_per_decade * math.log10(2) > room:
            return ticks
        return self._multiples((1,))[:: math.ceil(room / self._points_per_decade)]

    def minor_ticks(self) -> list[float]:
        """Where a mark stands without a number."""
        labelled = self.ticks()
        return [value for value in self._multiples(range(1, 10)) if value not in labelled]

    def _multiples(self, steps: Sequence[int]) -> list[float]:
        first, last = (math.floor(math.log10(end)) for end in (self.lower, self.upper))
        values = [_round(step, power) for power in range(first, last + 1) for step in steps]
        return [value for value in values if self.lower <= value <= self.upper]


def tick_label(value: float) -> str:
    """A round number without exponent.

    >>> tick_label(2e6), tick_label(0.05)
    ('2000000', '0.05')
    """
    return f"{value:.0f}" if value >= 1 else f"{value:.9f}".rstrip("0")


def plain(value: float) -> str:
    """A value in MiB as it is written in the figure: whole, or below 100 with one decimal.

    >>> plain(64718.4), plain(12.34), plain(0.0123)
    ('64718', '12.3', '0.012')
    """
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _below(value: float) -> float:
    power = math.floor(math.log10(value))
    return max(round_ for step in range(1, 10) if (round_ := _round(step, power)) <= value)


def _round(step: int, power: int) -> float:
    return float(step * 10**power) if power >= 0 else step / float(10**-power)
