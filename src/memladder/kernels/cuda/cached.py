"""The key-value cache: appending to it, and rotary positions that are read on the GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memladder import formats
from memladder.kernels.cuda.cached_attention import element
from memladder.kernels.cuda.rows import on_grid, sincos
from memladder.kernels.cuda.target import overlap, wait


@triton.jit
def _halves(x, at, inside, position, frequencies, ROTATED: tl.constexpr, D: tl.constexpr,
            HALF: tl.constexpr):  # fmt: skip
    """Both halves of some heads [HEADS, HALF] as float32, rotated and rounded to float16."""
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        pair = tl.arange(0, HALF)
        known = pair < D // 2
        angle = position.to(tl.float32) * tl.load(frequencies + pair, mask=known, other=0.0)
        sine, cosine = sincos(angle)
        turned = low * cosine[None, :] - high * sine[None, :]
        high = (high * cosine[None, :] + low * sine[None, :]).to(tl.float16).to(tl.float32)
        low = turned.to(tl.float16).to(tl.float32)
    return low, high


@triton.jit
def _hold(low, high, held, scales, place, there, D: tl.constexpr, HALF: tl.constexpr,
          TOP: tl.constexpr, MANTISSA: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Both halves of some heads to their places [HEADS] in the cache."""
    pair = tl.arange(0, HALF)
    inside = there[:, None] & (pair < D // 2)[None, :]
    if TOP > 0:
        # As integers magnitudes keep their order, and NaN is above them all.
        most = tl.maximum(tl.max(tl.abs(low).to(tl.int32, bitcast=True), axis=1),
                          tl.max(tl.abs(high).to(tl.int32, bitcast=True), axis=1))  # fmt: skip
        top = most.to(tl.float32, bitcast=True)
        scale = tl.where(top == 0.0, 1.0, tl.div_rn(top, tl.zeros_like(top) + TOP))
        tl.store(scales + place, scale, mask=there)
        scale = scale[:, None] + tl.zeros_like(low)
        low = on_grid(tl.div_rn(low, scale), TOP, MANTISSA, STEP)
        high = on_grid(tl.div_rn(high, scale), TOP, MANTISSA, STEP)
    at = (place * D)[:, None] + pair[None, :]
    tl.store(held + at, low.to(held.dtype.element_ty), mask=inside)
    tl.store(held + at + D // 2, high.to(held.dtype.element_ty), mask=inside)


@triton.jit
def _append(key, value, query, turned, keys, values, key_scales, value_scales, positions,
            frequencies, queries, start, capacity, heads, kv_heads, ROTATED: tl.constexpr,
            D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, TOP: tl.constexpr,
            MANTISSA: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence, index = row // queries, row % queries + start
    slot = tl.load(positions + 3 * sequence).to(tl.int64)
    position = tl.load(positions + 3 * sequence + 1) + index
    new = index < tl.load(positions + 3 * sequence + 2)
    # Blocks of heads: of keys, of values, of queries.
    blocks = tl.cdiv(kv_heads, HEADS)
    block = tl.program_id(1)
    kind = tl.minimum(block // blocks, 2)
    head = (block - kind * blocks) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    known = (pair < D // 2)[None, :]
    there = head < tl.where(new, kv_heads, 0)
    at = ((row * kv_heads + head) * D)[:, None] + pair[None, :]
    place = (slot * kv_heads + head) * capacity + position % capacity
    wait(PDL)
    if kind == 0:
        inside = there[:, None] & known
        low, high = _halves(key, at, inside, position, frequencies, ROTATED, D, HALF)
        _hold(low, high, keys, key_scales, place, there, D, HALF, TOP, MANTISSA, STEP)
    elif kind == 1:
        inside = there[:, None] & known
        low, high = _halves(value, at, inside, position, frequencies, False, D, HALF)
        _hold(low, high, values, value_scales, place, there, D, HALF, TOP, MANTISSA, STEP)
    else:
        inside = (head < heads)[:, None] & known
        at = ((row * heads + head) * D)[:, None] + pair[None, :]
        low, high = _halves(query, at, inside, position, frequencies, ROTATED, D, HALF)
        tl.store(turned + at, low.to(tl.float16), mask=inside)
        tl.store(turned + at + D // 2, high.to(tl.float16), mask=inside)


@triton.jit
def _rotary_at(x, frequencies, positions, out, queries, start, heads, D: tl.constexpr,
               HALF: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + 3 * (row // queries) + 1) + start + row % queries
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (pair < D // 2)[None, :]
    at = ((row * heads + head) * D)[:, None] + pair[None, :]
    wait(PDL)
    low, high = _halves(x, at, inside, position, frequencies, True, D, HALF)
    tl.store(out + at, low.to(tl.float16), mask=inside)
    tl.store(out + at + D // 2, high.to(tl.float16), mask=inside)


@triton.jit
def _advance(positions, sequences, BLOCK: tl.constexpr):
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = sequence < sequences
    new = tl.load(positions + 3 * sequence + 2, mask=there)
    past = tl.load(positions + 3 * sequence + 1, mask=there)
    tl.store(positions + 3 * sequence + 1, past + new, mask=there)


def rotary_at(
    x: Tensor, frequencies: Tensor, positions: Tensor, out: Tensor, *, head_dim: int, start: int
) -> None:
    """As `naive.rotary_at`."""
    rows, columns = x.shape
    heads = columns // head_dim
    block = min(8, triton.next_power_of_2(heads))
    _rotary_at[(rows, triton.cdiv(heads, block))](
        *(x, frequencies, positions, out, rows // len(positions), start, heads),
        D=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=block,
        num_warps=4,
        **overlap(),
    )


def cache_append(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    kv_heads: int,
    capacity: int,
    start: int,
    format: str = "fp16",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    frequencies: Tensor | None = None,
    query: Tensor | None = None,
    turned: Tensor | None = None,
) -> None:
    """As `naive.cache_append`, code by code."""
    rows, d = len(key), keys.shape[1]
    heads = 0 if query is None else query.shape[1] // d
    block = min(8, triton.next_power_of_2(kv_heads))
    programs = 2 * triton.cdiv(kv_heads, block) + triton.cdiv(heads, block)
    codes = element(format)
    _append[(rows, programs)](
        *(key, value, key if query is None else query, key if turned is None else turned),
        *(keys.view(codes), values.view(codes)),
        key if key_scales is None else key_scales,
        key if value_scales is None else value_scales,
        positions,
        key if frequencies is None else frequencies,
        *(rows // len(positions), start, capacity, heads, kv_heads),
        ROTATED=frequencies is not None,
        D=d,
        HALF=triton.next_power_of_2(d // 2),
        HEADS=block,
        **_grid(format),
        num_warps=4,
        **overlap(),
    )


def advance(positions: Tensor) -> None:
    """As `naive.advance`."""
    block = 128
    _advance[(triton.cdiv(len(positions), block),)](positions, len(positions), BLOCK=block)


def _grid(format: str) -> dict[str, float | int]:
    """Numbers that a cache's codes stand for: the largest, bits of mantissa, the smallest step."""
    kind = formats.get(format)
    if kind.bits == 16:
        return {"TOP": 0.0, "MANTISSA": 0, "STEP": 1.0}
    known = kind.element_type
    assert known is not None
    return {"TOP": known.top, "MANTISSA": known.mantissa, "STEP": known.step}
