"""Which tiles of its operands a kernel needs for a tile of its output, and what that costs.

A node is an index map: a tile [rows, columns] of its output needs so many rows and columns of each
operand. Two nodes are connected in registers where the consumer needs just the tile that the
producer has made, in shared memory where it needs more, but no more than fits; else the value goes
through global memory. The tile of a product is that which moves the fewest bytes; of those alike,
the one that computes the least beyond the output's edge, then the one that leaves the fewest
multiprocessors idle in its last wave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from memladder.engine.compiler.fuse import Glu, NamedNorm, Product
from memladder.engine.graph.nodes import (
    Attention,
    Linear,
    Node,
    Norm,
    Pointwise,
    Rotary,
)

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
class Cut:
    """A product's tile, the bytes that it moves, and its waves over the multiprocessors."""

    rows: int
    columns: int
    nbytes: int
    waves: float


def cut(tokens: int, columns: int, k: int, weight_bytes: int) -> Cut:
    """The tile of a product [tokens, columns] over K.

    A weight is read once for each row of tiles, and the activation once for each column of tiles,
    unless the cache holds them from the first time on.
    """
    found = []
    for rows in _ROWS:
        for width in _COLUMNS:
            down, across = math.ceil(tokens / rows), math.ceil(columns / width)
            activation = tokens * k * ITEM_BYTES
            # Tiles of one column are computed next to each other: they share the weight's tile.
            again = 1 if weight_bytes <= CACHE_BYTES // 2 or down <= MULTIPROCESSORS else down
            times = 1 if activation <= CACHE_BYTES // 2 else across
            nbytes = weight_bytes * again + activation * times + tokens * columns * ITEM_BYTES
            waves = down * across / MULTIPROCESSORS
            found.append(Cut(rows, width, nbytes, waves))

    def cost(c: Cut) -> tuple[float, ...]:
        area = c.rows * c.columns
        return c.nbytes, c.waves * area, math.ceil(c.waves) / c.waves, -area

    return min(found, key=cost)
