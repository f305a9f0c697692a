"""Causal attention whose scores stay on the chip.

Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithm 1: a program has some queries of one
head, and walks over the keys with a running maximum and sum. Heads are taken in two halves, as
rotary positions pair them: a score is the sum of two products, an output two tiles.

Where `exact`, what is not float16 already (rotated queries, the softmax's weights) is multiplied in
two parts, the number's float16 and what that leaves: as good as float32, at twice the products.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.rows import sincos
from memladder.kernels.cuda.target import has_wgmma

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(low, high, low_rest, high_rest, k, v, first, position, scale, slope,
          most, total, sums_low, sums_high, stride, keys,
          D: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr,
          ROTARY: tl.constexpr, ALIBI: tl.constexpr, EXACT: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    key = first + tl.arange(0, KEYS)
    pair = tl.arange(0, HALF)
    at = key[:, None].to(tl.int64) * stride + pair[None, :]
    if MASKED or HALF != D // 2:
        inside = (key < keys)[:, None] & (pair < D // 2)[None, :]
        k_low = tl.load(k + at, mask=inside, other=0.0)
        k_high = tl.load(k + at + D // 2, mask=inside, other=0.0)
        v_low = tl.load(v + at, mask=inside, other=0.0)
        v_high = tl.load(v + at + D // 2, mask=inside, other=0.0)
    else:
        k_low = tl.load(k + at)
        k_high = tl.load(k + at + D // 2)
        v_low = tl.load(v + at)
        v_high = tl.load(v + at + D // 2)
    scores = tl.dot(low, tl.trans(k_low))
    scores = tl.dot(high, tl.trans(k_high), scores)
    if EXACT and ROTARY:
        scores = tl.dot(low_rest, tl.trans(k_low), scores)
        scores = tl.dot(high_rest, tl.trans(k_high), scores)
    scores *= scale
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
    sums_low = tl.dot(rounded, v_low, sums_low * old[:, None])
    sums_high = tl.dot(rounded, v_high, sums_high * old[:, None])
    if EXACT:
        rest = (weights - rounded.to(tl.float32)).to(tl.float16)
        sums_low = tl.dot(rest, v_low, sums_low)
        sums_high = tl.dot(rest, v_high, sums_high)
    return new, total, sums_low, sums_high


@triton.jit
def _attention(query, key, value, out, frequencies, slopes, queries, keys, heads, kv_heads, scale,
               D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
               ROTARY: tl.constexpr, ALIBI: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    # The last queries see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    position = keys - queries + row
    pair = tl.arange(0, HALF)
    at = ((sequence * queries + row[:, None]) * heads + head) * D + pair[None, :]
    inside = (row < queries)[:, None] & (pair < D // 2)[None, :]
    low = tl.load(query + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(query + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        angle = tl.load(frequencies + pair, mask=pair < D // 2, other=0.0)
        sine, cosine = sincos(position.to(tl.float32)[:, None] * angle[None, :])
        turned = low * cosine - high * sine
        high = high * cosine + low * sine
        low = turned
    low_rest = (low - low.to(tl.float16).to(tl.float32)).to(tl.float16)
    high_rest = (high - high.to(tl.float16).to(tl.float32)).to(tl.float16)
    low = low.to(tl.float16)
    high = high.to(tl.float16)
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
    sums_low = tl.zeros((ROWS, HALF), tl.float32)
    sums_high = tl.zeros((ROWS, HALF), tl.float32)
    first = keys - queries + block * ROWS
    whole = (first + 1) // KEYS * KEYS
    for start in range(0, whole, KEYS):
        most, total, sums_low, sums_high = _step(
            low, high, low_rest, high_rest, key, value, start, position, scale, slope,
            most, total, sums_low, sums_high, stride, keys, D, HALF, KEYS, ROTARY, ALIBI, EXACT,
            False)  # fmt: skip
    for start in range(whole, tl.minimum(first + ROWS, keys), KEYS):
        most, total, sums_low, sums_high = _step(
            low, high, low_rest, high_rest, key, value, start, position, scale, slope,
            most, total, sums_low, sums_high, stride, keys, D, HALF, KEYS, ROTARY, ALIBI, EXACT,
            True)  # fmt: skip
    total = 1.0 / total
    tl.store(out + at, (sums_low * total[:, None]).to(tl.float16), mask=inside)
    tl.store(out + at + D // 2, (sums_high * total[:, None]).to(tl.float16), mask=inside)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    frequencies: Tensor | None = None,
    slopes: Tensor | None = None,
    exact: bool = False,
) -> None:
    """As `naive.attention`."""
    d = query.shape[1] // heads
    queries, keys = query.shape[0] // sequences, key.shape[0] // sequences
    # Two parts of everything take twice the registers.
    most = 128 if not exact else 64 if has_wgmma() else 32
    rows = min(most, max(16, triton.next_power_of_2(queries)))
    _attention[(triton.cdiv(queries, rows), heads, sequences)](
        *(query, key, value, out),
        query if frequencies is None else frequencies,
        query if slopes is None else slopes,
        *(queries, keys, heads, kv_heads, d**-0.5),
        D=d,
        HALF=max(16, triton.next_power_of_2(d // 2)),
        ROWS=rows,
        KEYS=32 if rows == 16 else 64,
        ROTARY=frequencies is not None,
        ALIBI=slopes is not None,
        EXACT=exact,
        num_warps=8 if rows == 128 or (exact and rows == 64) else 4,
        num_stages=2,
    )
