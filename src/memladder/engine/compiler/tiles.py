"""Which tiles of its operands a kernel needs for a tile of its output, and what that costs.

A node is an index map: a tile [rows, columns] of its output needs so many rows and columns of each
operand. Two nodes are connected in registers where the consumer needs just the tile that the
producer has made, in shared memory where it needs more, but no more than fits; else the value goes
through global memory. The tile of a product is that which moves the fewest bytes from memory; of
those alike, the fewest from the cache, counted for all multiprocessors that its last wave leaves
idle; then the one that computes the least beyond the output's edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from memladder.engine.compiler.fused import Glu, NamedNorm, Product
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
    """A product's tile; bytes from memory and from the cache; waves over the multiprocessors."""

    rows: int
    columns: int
    nbytes: int
    cache_bytes: int
    waves: float


def cut(tokens: int, columns: int, k: int, weight_bytes: int) -> Cut:
    """The tile of a product [tokens, columns] over K.

    A weight is read once for each row of tiles, and the activation once for each column of tiles:
    from memory the first time, and again where neither fits into the cache.
    """
    activation = tokens * k * ITEM_BYTES
    fits = min(weight_bytes, activation) <= CACHE_BYTES // 2
    found = []
    for rows in _ROWS:
        for width in _COLUMNS:
            down, across = math.ceil(tokens / rows), math.ceil(columns / width)
            cached = weight_bytes * down + activation * across
            moved = weight_bytes + activation if fits else cached
            nbytes = moved + tokens * columns * ITEM_BYTES
            found.append(Cut(rows, width, nbytes, cached, down * across / MULTIPROCESSORS))

    def cost(c: Cut) -> tuple[float, ...]:
        idle = math.ceil(c.waves) / c.waves
        return c.nbytes, c.cache_bytes * idle, c.rows * c.columns * c.waves

    return min(found, key=cost)
