"""Causal attention whose scores stay on the chip.

Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithm 1: a program has some queries of one
head, and walks over the keys with a running maximum and sum.

Where `exact`, the softmax's weights are multiplied in two parts, the number's float16 and what that
leaves: as good as float32, at half as many products again.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.kernels.cuda.target import has_wgmma, overlap, wait
from memladder.kernels.cuda.tuning import choice

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x, row, first, count, column, stride, D: tl.constexpr, WIDTH: tl.constexpr,
          KEYS: tl.constexpr, MASKED: tl.constexpr, COPIED: tl.constexpr):  # fmt: skip
    """Keys or values [KEYS, WIDTH] from key `first` of those that begin at `row`.

    What lies beyond the last key or column is not zero: such a score is masked, such a column is
    multiplied by a query's zero, or not stored.
    """
    if COPIED:
        tile = x.load([row + first, column])
    else:
        key = tl.arange(0, KEYS)
        lane = tl.arange(0, WIDTH)
        x += (row + first).to(tl.int64) * stride + column
        at = key[:, None] * stride + lane[None, :]
        if MASKED or WIDTH != D:
            inside = (first + key < count)[:, None] & (lane < D)[None, :]
            tile = tl.load(x + at, mask=inside, other=0.0)
        else:
            tile = tl.load(x + at)
    return tile


@triton.jit
def _step(q, k, v, row, first, keys, column, stride, origin, position, scale, slope,
          most, total, sums, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
          ALIBI: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
          COPIED: tl.constexpr):  # fmt: skip
    b_k = _tile(k, row, first, keys, column, stride, D, WIDTH, KEYS, MASKED, COPIED)
    scores = tl.dot(q, tl.trans(b_k))
    key = first + tl.arange(0, KEYS)
    # Scores are taken in units of log2 e: the softmax is to the base of 2. A query's own position
    # moves all of its scores alike: distances are taken from the program's first one.
    if ALIBI:
        scores = scores * scale + (slope * (key - origin).to(tl.float32))[None, :]
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    if ALIBI:
        weights = tl.exp2(scores - new[:, None])
        old = tl.exp2(most - new)
    else:
        weights = tl.exp2(scores * scale - (new * scale)[:, None])
        old = tl.exp2((most - new) * scale)
    total = total * old + tl.sum(weights, axis=1)
    sums *= old[:, None]
    b_v = _tile(v, row, first, keys, column, stride, D, WIDTH, KEYS, MASKED, COPIED)
    rounded = weights.to(tl.float16)
    sums = tl.dot(rounded, b_v, sums)
    if EXACT:
        rest = (weights - rounded.to(tl.float32)).to(tl.float16)
        sums = tl.dot(rest, b_v, sums)
    return new, total, sums


@triton.jit
def _attention(query, key, value, out, slopes, queries, keys, heads, kv_heads, scale,
               D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
               ALIBI: tl.constexpr, EXACT: tl.constexpr, COPIED: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    # The last queries see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    row = block * ROWS + tl.arange(0, ROWS)
    origin = keys - queries + block * ROWS
    position = keys - queries + row
    column = tl.arange(0, WIDTH)
    at = (sequence.to(tl.int64) * queries + row[:, None]) * heads + head
    at = at * D + column[None, :]
    inside = (row < queries)[:, None] & (column < D)[None, :]
    scale *= _LOG2E
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * _LOG2E
    own = head * kv_heads // heads * D
    stride = kv_heads * D
    first_row = sequence * keys
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    wait(PDL)
    q = tl.load(query + at, mask=inside, other=0.0)
    whole = (origin + 1) // KEYS * KEYS
    for start in range(0, whole, KEYS):
        most, total, sums = _step(q, key, value, first_row, start, keys, own, stride, origin,
                                  position, scale, slope, most, total, sums, D, WIDTH, KEYS,
                                  ALIBI, EXACT, False, COPIED)  # fmt: skip
    for start in range(whole, tl.minimum(origin + ROWS, keys), KEYS):
        most, total, sums = _step(q, key, value, first_row, start, keys, own, stride, origin,
                                  position, scale, slope, most, total, sums, D, WIDTH, KEYS,
                                  ALIBI, EXACT, True, COPIED)  # fmt: skip
    tl.store(out + at, (sums / total[:, None]).to(tl.float16), mask=inside)


@triton.jit
def _alone(value, out, heads, kv_heads, D: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = at < heads * D
    own = at // D * kv_heads // heads * D + at % D
    wait(PDL)
    b_v = tl.load(value + row * kv_heads * D + own, mask=inside)
    tl.store(out + row * heads * D + at, b_v, mask=inside)


@dataclass(frozen=True)
class AttentionCut:
    """A program's queries, keys at a time, warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


_CUTS = {
    "few": (AttentionCut(16, 32, 4, 2),),
    "some": (AttentionCut(64, 64, 4, 2), AttentionCut(32, 64, 4, 2)),
    "many": (AttentionCut(128, 128, 8, 3), AttentionCut(128, 64, 8, 3)),
    "many exact": (AttentionCut(128, 64, 8, 3),),
    # Without asynchronous products more lies in registers.
    "few held": (AttentionCut(16, 32, 4, 2),),
    "some held": (AttentionCut(32, 32, 4, 2),),
    "many held": (AttentionCut(64, 32, 4, 1),),
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    slopes: Tensor | None = None,
    exact: bool = False,
) -> None:
    """As `naive.attention`."""
    d = query.shape[1] // heads
    queries, keys = query.shape[0] // sequences, key.shape[0] // sequences
    if keys == 1:
        # A single score's weight is 1.
        grid = (triton.cdiv(heads * d, 1024), sequences)
        _alone[grid](value, out, heads, kv_heads, D=d, BLOCK=1024, num_warps=4, **overlap())
        return
    kind = "few" if queries <= 16 else "some" if queries <= 64 else "many"
    if not has_wgmma():
        kind += " held"
    elif kind == "many" and exact:
        kind += " exact"
    cut = choice("attention", kind, _CUTS[kind])
    width = max(16, triton.next_power_of_2(d))
    copied = has_wgmma() and d % 8 == 0
    tiles: list[Tensor | TensorDescriptor] = [key, value]
    if copied:
        shape, stride = list(key.shape), [key.shape[1], 1]
        tiles = [TensorDescriptor(x, shape, stride, [cut.keys, width]) for x in (key, value)]
    _attention[(triton.cdiv(queries, cut.rows), heads, sequences)](
        *(query, *tiles, out),
        query if slopes is None else slopes,
        *(queries, keys, heads, kv_heads, d**-0.5),
        D=d,
        WIDTH=width,
        ROWS=cut.rows,
        KEYS=cut.keys,
        ALIBI=slopes is not None,
        EXACT=exact,
        COPIED=copied,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlap(),
    )
