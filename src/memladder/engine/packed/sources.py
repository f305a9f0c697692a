"""Which rows of a checkpoint's tensors a layer's matrices and vectors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from memladder.engine.graph.fused import Fused


@dataclass(frozen=True)
class Source:
    """Rows of a tensor: ranges first … last − 1, one after the other.

    BLOOM keeps query, key and value of a head next to each other: there the keys of all heads are
    as many ranges as heads. What the tensor holds is multiplied by `factor` (scores that are not
    divided by √d), and `shift` is added to it (Gemma stores the weights of its norms less 1).
    """

    tensor: str
    ranges: tuple[tuple[int, int], ...]
    factor: float = 1.0
    shift: float = 0.0

    def applied(self, stored: Tensor) -> Tensor:
        """The stored numbers that are read."""
        if (self.factor, self.shift) == (1.0, 0.0):
            return stored
        return stored.float() * self.factor + self.shift

    @classmethod
    def of(cls, tensor: str, rows: np.ndarray) -> Source:
        """Of the rows' numbers.

        >>> Source.of("qkv", np.array([4, 5, 6, 7, 16, 17])).ranges
        ((4, 8), (16, 18))
        """
        ends = np.flatnonzero(np.diff(rows) != 1)
        firsts = rows[np.concatenate(([0], ends + 1))]
        lasts = rows[np.concatenate((ends, [len(rows) - 1]))] + 1
        return cls(tensor, tuple(zip(firsts.tolist(), lasts.tolist(), strict=True)))

    def __len__(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows start … stop of the result as ranges of the tensor's own rows.

        >>> list(Source("qkv", ((4, 8), (16, 20), (28, 32))).runs(2, 9))
        [(6, 8), (16, 20), (28, 29)]
        """
        at = 0
        for first, last in self.ranges:
            inner = max(start - at, 0), min(stop - at, last - first)
            if inner[0] < inner[1]:
                yield first + inner[0], first + inner[1]
            at += last - first


@dataclass(frozen=True)
class CompiledLayer:
    """A fused layer; where each matrix and vector lies in a checkpoint; its float32 constants."""

    fused: Fused
    sources: Mapping[str, Source]
    constants: Mapping[str, Tensor]
