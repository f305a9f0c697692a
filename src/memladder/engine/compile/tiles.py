"""Which tiles of its operands a kernel needs for a tile of its output, and what that costs.

A node is an index map: a tile [rows, columns] of its output needs so many rows and columns of each
operand. Two nodes are connected in registers where the consumer needs just the tile that the
producer has made, in shared memory where it needs more, but no more than fits; else the value goes
through global memory. The tile of a product is that which moves the fewest bytes from the cache,
counted for all multiprocessors that its last wave leaves idle; of those alike, the one that
computes the least beyond the output's edge.

Tiles are computed in waves, one tile a multiprocessor, all rows of a column of tiles together. So a
weight is read once, and the activation once a wave, if the weights that pass by meanwhile push it
out of the cache: as Nsight Compute counts it on an H100 (docs/evidence/traffic-h100.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from memladder.engine.graph.fused import Glu, NamedNorm, Product
from memladder.engine.graph.nodes import Attention, Linear, Node, Norm, Pointwise, Rotary

Tile: TypeAlias = tuple[int, int]
"""Rows, columns."""

ITEM_BYTES = 2
# H100 SXM: CUDA C++ Programming Guide, compute capability 9.0; NVIDIA H100 white paper.
SHARED_BYTES = 227 << 10
MULTIPROCESSORS = 132
CACHE_BYTES = 50 << 20

# Rows and columns of a product's tile, as the kernels have them.
_ROWS = (16, 32, 64, 128)
_COLUMNS = (64, 128, 256)


def needed(node: Node, tile: Tile) -> list[Tile]:
    """The tile of each of the node's inputs that a tile of its output is computed from."""
    rows, columns = tile
    if isinstance(node, Product):
        residual = [] if node.residual is None else [tile]
        return [*residual, (rows, node.x.columns)]
    if isinstance(node, Linear | Glu):
        return [(rows, node.x.columns)]
    if isinstance(node, Norm | NamedNorm):
        return [(rows, _whole(columns, node.group))]
    if isinstance(node, Rotary):
        return [(rows, _whole(columns, node.head_dim))]
    if isinstance(node, Attention):
        own = _whole(columns, node.columns // node.heads)
        heads = math.ceil(own * node.kv_heads / node.columns)
        keys = node.key.columns // node.kv_heads * heads
        # Keys and values pass by, tile by tile, for as long as the query's tile stays.
        return [(rows, own), (rows, keys), (rows, keys)]
    if isinstance(node, Pointwise):
        return [tile for _ in node.operands]
    return [(rows, x.columns) for x in node.inputs]


def _whole(columns: int, group: int) -> int:
    return math.ceil(columns / group) * group


def connection(producer: Node, consumer: Node, tile: Tile) -> str:
    """`register`, `shared` or `global`: where a tile of the consumer may find the producer's value.

    `tile` is of the producer's output, and of the consumer's as far as that is as wide.
    """
    rows, columns = tile
    own = (rows, min(columns, consumer.columns))
    wants = [
        want
        for x, want in zip(consumer.inputs, needed(consumer, own), strict=True)
        if x is producer
    ]
    widest = max(want[1] for want in wants)
    if widest <= columns:
        return "register"
    return "shared" if rows * widest * ITEM_BYTES <= SHARED_BYTES else "global"


@dataclass(frozen=True)
class Tiling:
    """A product's tile; bytes from the cache; waves over the multiprocessors; and how often the
    activation is read from memory."""

    rows: int
    columns: int
    cache_bytes: int
    waves: float
    reads: int


def cut(tokens: int, columns: int, k: int, weight_bytes: int) -> Tiling:
    """The tile of a product [tokens, columns] over K."""
    activation = tokens * k * ITEM_BYTES
    found = []
    for rows in _ROWS:
        for width in _COLUMNS:
            down, across = math.ceil(tokens / rows), math.ceil(columns / width)
            waves = down * across / MULTIPROCESSORS
            # Half of the cache: its two parts keep what both read twice.
            stays = weight_bytes / max(waves, 1) + activation <= CACHE_BYTES // 2
            # Kernels for few rows have the cache let go of weights first.
            reads = 1 if stays or tokens <= _ROWS[-1] else math.ceil(waves)
            cached = weight_bytes * down + activation * across
            found.append(Tiling(rows, width, cached, waves, reads))

    def cost(c: Tiling) -> tuple[float, ...]:
        idle = math.ceil(c.waves) / c.waves
        return c.cache_bytes * idle, c.rows * c.columns * c.waves

    return min(found, key=cost)
