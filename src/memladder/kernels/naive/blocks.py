"""How the naive kernels divide their operands, so that they need little memory besides."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# float32: 4 MiB. A kernel holds a few of them at a time.
TILE = 1 << 20
ROWS = 512


def blocks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def row_blocks(x: Tensor) -> Iterator[slice]:
    return blocks(x.shape[0], max(1, TILE // x.shape[1]))
