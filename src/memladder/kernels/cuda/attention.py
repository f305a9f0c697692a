"""Causal attention whose scores stay on the chip.

Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithm 1: a program has some queries of one
head, and walks over the keys with a running maximum and sum.

Where `exact`, the softmax's weights are multiplied in two parts, the number's float16 and what that
leaves: as good as float32, at half as many products again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.target import has_wgmma

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(q, k, v, first, position, scale, slope, most, total, sums, stride, keys,
          D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
          ALIBI: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    key = first + tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)
    at = key[:, None].to(tl.int64) * stride + column[None, :]
    # [KEYS, WIDTH]
    if MASKED or WIDTH != D:
        inside = (key < keys)[:, None] & (column < D)[None, :]
        b_k = tl.load(k + at, mask=inside, other=0.0)
        b_v = tl.load(v + at, mask=inside, other=0.0)
    else:
        b_k = tl.load(k + at)
        b_v = tl.load(v + at)
    scores = tl.dot(q, tl.trans(b_k)) * scale
    distance = key[None, :] - position[:, None]
    if ALIBI:
        scores += slope * distance.to(tl.float32)
    if MASKED:
        scores = tl.where(distance <= 0, scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    old = tl.exp2(most - new)
    total = total * old + tl.sum(weights, axis=1)
    rounded = weights.to(tl.float16)
    sums = tl.dot(rounded, b_v, sums * old[:, None])
    if EXACT:
        rest = (weights - rounded.to(tl.float32)).to(tl.float16)
        sums = tl.dot(rest, b_v, sums)
    return new, total, sums


@triton.jit
def _attention(query, key, value, out, slopes, queries, keys, heads, kv_heads, scale,
               D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
               ALIBI: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    # The last queries see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    position = keys - queries + row
    column = tl.arange(0, WIDTH)
    at = ((sequence * queries + row[:, None]) * heads + head) * D + column[None, :]
    inside = (row < queries)[:, None] & (column < D)[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)
    # Scores are taken in units of log2 e: the softmax is to the base of 2.
    scale *= _LOG2E
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * _LOG2E
    own = head * kv_heads // heads
    stride = kv_heads * D
    key += sequence * keys * stride + own * D
    value += sequence * keys * stride + own * D
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = keys - queries + block * ROWS
    whole = (first + 1) // KEYS * KEYS
    for start in range(0, whole, KEYS):
        most, total, sums = _step(q, key, value, start, position, scale, slope, most, total, sums,
                                  stride, keys, D, WIDTH, KEYS, ALIBI, EXACT, False)  # fmt: skip
    for start in range(whole, tl.minimum(first + ROWS, keys), KEYS):
        most, total, sums = _step(q, key, value, start, position, scale, slope, most, total, sums,
                                  stride, keys, D, WIDTH, KEYS, ALIBI, EXACT, True)  # fmt: skip
    tl.store(out + at, (sums / total[:, None]).to(tl.float16), mask=inside)


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
    rows = min(128, max(16, triton.next_power_of_2(queries)))
    if exact and not has_wgmma():
        # Two parts of the weights take twice the registers.
        rows = min(64, rows)
    _attention[(triton.cdiv(queries, rows), heads, sequences)](
        *(query, key, value, out),
        query if slopes is None else slopes,
        *(queries, keys, heads, kv_heads, d**-0.5),
        D=d,
        WIDTH=max(16, triton.next_power_of_2(d)),
        ROWS=rows,
        KEYS=32 if rows == 16 else 64,
        ALIBI=slopes is not None,
        EXACT=exact,
        num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )
