"""Attention with a window of the last tokens, or with soft-capped scores, which stay on the chip.

As `attention.py`, after Dao 2023 (arXiv:2307.08691), algorithm 1; keys before the window are not
read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.target import overlap, wait

_LOG2E = tl.constexpr(1.4426950408889634)
# Queries of a program, and keys at a time: few enough that all stays in registers.
_ROWS, _KEYS = 32, 32


@triton.jit
def _windowed(query, key, value, out, queries, keys, heads, kv_heads, scale, window, cap,
              D: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr,
              PDL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    position = keys - queries + row
    column = tl.arange(0, WIDTH)
    at = ((sequence * queries + row[:, None]) * heads + head) * D + column[None, :]
    inside = (row < queries)[:, None] & (column < D)[None, :]
    stride = kv_heads * D
    first = sequence * keys * stride + head * kv_heads // heads * D
    # Finite: a block may hold no key that a query sees.
    most = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    wait(PDL)
    q = tl.load(query + at, mask=inside, other=0.0)  # [ROWS, WIDTH]
    origin = keys - queries + block * ROWS
    begin = tl.maximum(origin - window + 1, 0) // KEYS * KEYS
    for start in range(begin, tl.minimum(origin + ROWS, keys), KEYS):
        token = start + tl.arange(0, KEYS)
        places = first + token[:, None].to(tl.int64) * stride + column[None, :]
        there = (token < keys)[:, None] & (column < D)[None, :]
        b_k = tl.load(key + places, mask=there, other=0.0)  # [KEYS, WIDTH]
        scores = tl.dot(q, tl.trans(b_k)) * scale
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        distance = position[:, None] - token[None, :]
        seen = (distance >= 0) & (distance < window)
        scores = tl.where(seen, scores * _LOG2E, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        old = tl.exp2(most - new)
        total = total * old + tl.sum(weights, axis=1)
        sums *= old[:, None]
        b_v = tl.load(value + places, mask=there, other=0.0)  # [KEYS, WIDTH]
        rounded = weights.to(tl.float16)
        sums = tl.dot(rounded, b_v, sums)
        if EXACT:
            rest = (weights - rounded.to(tl.float32)).to(tl.float16)
            sums = tl.dot(rest, b_v, sums)
        most = new
    tl.store(out + at, (sums / total[:, None]).to(tl.float16), mask=inside)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    window: int = 0,
    softcap: float = 0.0,
    exact: bool = False,
) -> None:
    """As `naive.windowed_attention`."""
    d = query.shape[1] // heads
    queries, keys = query.shape[0] // sequences, key.shape[0] // sequences
    _windowed[(triton.cdiv(queries, _ROWS), heads, sequences)](
        *(query, key, value, out),
        *(queries, keys, heads, kv_heads, d**-0.5, window or keys, softcap),
        D=d,
        WIDTH=max(16, triton.next_power_of_2(d)),
        CAPPED=softcap > 0,
        EXACT=exact,
        ROWS=_ROWS,
        KEYS=_KEYS,
        num_stages=2,
        **overlap(),
    )
