"""Norms, activation quantisation and rotary positions: kernels that take a row, or a part of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder import formats
from memladder.core.errors import UnavailableError
from memladder.kernels.cuda.target import INTERPRETED, capability, overlap, wait

# Elements of a row that a program holds at once.
_BLOCK = 4096
# A row of so many is held in registers as a whole.
_WHOLE = 16384
# So few rows do not fill a GPU.
_FEW = 64
# With few rows, a program quantises this many elements of one.
_SHARE = 4096
_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a float32 below 2²² and taken away again, it rounds to even."""


@triton.jit
def _norm(x, weight, bias, out, columns, eps, CENTRED: tl.constexpr, WHOLE: tl.constexpr,
          PDL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    out += row * columns
    lanes = tl.arange(0, BLOCK)
    wait(PDL)
    mean = 0.0
    if WHOLE:
        # The row stays in registers.
        inside = lanes < columns
        values = tl.load(x + lanes, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            values = tl.where(inside, values - tl.sum(values) / columns, 0.0)
        values *= (1.0 / tl.sqrt(tl.sum(values * values) / columns + eps)) * factor
        if CENTRED:
            values += tl.load(bias + lanes, mask=inside, other=0.0)
        tl.store(out + lanes, values.to(tl.float16), mask=inside)
        return
    if CENTRED:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + lanes
            total += tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        mean = tl.sum(total) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        values = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        values = tl.where(at < columns, values - mean, 0.0)
        squares += values * values
    scale = 1.0 / tl.sqrt(tl.sum(squares) / columns + eps)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        inside = at < columns
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        values = (values - mean) * scale * tl.load(weight + at, mask=inside, other=0.0)
        if CENTRED:
            values += tl.load(bias + at, mask=inside, other=0.0)
        tl.store(out + at, values.to(tl.float16), mask=inside)


@triton.jit
def on_grid(values, TOP: tl.constexpr, MANTISSA: tl.constexpr, STEP: tl.constexpr):
    """float32 rounded to an element of that many mantissa bits and that smallest subnormal.

    To nearest, ties to even, saturating: what the hardware's conversion does, done by hand, since
    Triton's interpreter (3.9) loses the carry of a mantissa that is rounded up to a power of two.
    """
    values = tl.clamp(values, -TOP, TOP, propagate_nan=tl.PropagateNan.ALL)
    if MANTISSA == 0:
        return (values + _ROUND * STEP) - _ROUND * STEP
    REST: tl.constexpr = 23 - MANTISSA
    bits = values.to(tl.int32, bitcast=True)
    magnitude = tl.abs(values)
    small = ((magnitude + _ROUND * STEP) - _ROUND * STEP).to(tl.int32, bitcast=True)
    # Zero keeps its sign.
    small |= bits & -0x80000000
    bits += (1 << (REST - 1)) - 1 + ((bits >> REST) & 1)
    bits = tl.where(magnitude < STEP * (1 << MANTISSA), small, bits & (-1 << REST))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _quantise(x, codes, scales, columns, TOP: tl.constexpr, MANTISSA: tl.constexpr,
              STEP: tl.constexpr, HARDWARE: tl.constexpr, PDL: tl.constexpr,
              BLOCK: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    codes += row * columns
    lanes = tl.arange(0, BLOCK)
    # All of a row is read by each of the programs that share it.
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        values = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        # As integers magnitudes keep their order, and NaN is above them all.
        most = tl.maximum(most, tl.abs(values).to(tl.int32, bitcast=True))
    top = tl.max(most).to(tl.float32, bitcast=True)
    scale = tl.where(top == 0.0, 1.0, tl.div_rn(top, TOP))
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    lanes = tl.arange(0, SHARE)
    for start in range(tl.program_id(1) * SHARE, columns, SHARE * tl.num_programs(1)):
        at = start + lanes
        inside = at < columns
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HARDWARE:
            # The quotient rounded to nearest, by two corrections with fused products (Markstein
            # 1990, IBM Journal of Research and Development 34, 1). An infinite scale needs none,
            # and zeros keep their sign.
            near = values * inverse
            better = tl.fma(tl.fma(-near, scale, values), inverse, near)
            better = tl.fma(tl.fma(-better, scale, values), inverse, better)
            values = tl.where((inverse == 0.0) | (near == 0.0), near, better)
        else:
            values = tl.div_rn(values, tl.zeros_like(values) + scale)
        if not (HARDWARE and codes.dtype.element_ty.primitive_bitwidth == 8 and MANTISSA > 0):
            values = on_grid(values, TOP, MANTISSA, STEP)
        tl.store(codes + at, values.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _quantise_blocks(x, codes, scales, columns, groups, TOP: tl.constexpr, MANTISSA: tl.constexpr,
                     STEP: tl.constexpr, EXPONENT: tl.constexpr, GROUP: tl.constexpr,
                     PDL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=1)
    exponent = most >> 23
    # float16 is far from both ends of E8M0, except zero and numbers that are not finite.
    code = tl.maximum(exponent - EXPONENT, 0)
    inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
    code = tl.where(exponent == 255, 255, code)
    values = on_grid(values * inverse[:, None], TOP, MANTISSA, STEP)
    tl.store(codes + row * columns + at, values.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row * groups + block, code.to(tl.uint8), mask=block < groups)


@triton.jit
def sincos(angle):
    """Sine and cosine of float32 angles of up to 10⁵ radians, within 2e-7.

    Cody and Waite 1980, "Software Manual for the Elementary Functions", chapter 8: π/2 in three
    parts; polynomials of Moshier's Cephes (sinf.c).
    """
    turns = (angle * 0.6366197723675814 + _ROUND) - _ROUND
    rest = angle - turns * 1.5703125
    rest -= turns * 4.837512969970703125e-4
    rest -= turns * 7.549789948768648e-8
    square = rest * rest
    sine = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = sine * square * rest + rest
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    quadrant = turns.to(tl.int32)
    odd = (quadrant & 1) != 0
    found_sine = tl.where(odd, cosine, sine)
    found_cosine = tl.where(odd, sine, cosine)
    found_sine = tl.where((quadrant & 2) != 0, -found_sine, found_sine)
    found_cosine = tl.where(((quadrant + 1) & 2) != 0, -found_cosine, found_cosine)
    return found_sine, found_cosine


@triton.jit
def _rotary(x, frequencies, out, heads, start, seq_len, D: tl.constexpr, HALF: tl.constexpr,
            HEADS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    known = pair < D // 2
    angle = ((start + row) % seq_len).to(tl.float32) * tl.load(frequencies + pair, mask=known)
    sine, cosine = sincos(angle)
    at = (row.to(tl.int64) * heads + head[:, None]) * D + pair[None, :]
    inside = (head < heads)[:, None] & known[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    turned = low * cosine[None, :] - high * sine[None, :]
    tl.store(out + at, turned.to(tl.float16), mask=inside)
    turned = high * cosine[None, :] + low * sine[None, :]
    tl.store(out + at + D // 2, turned.to(tl.float16), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """As `naive.rms_norm`."""
    rows, columns = x.shape
    _norm[(rows,)](x, weight, weight, out, columns, eps, CENTRED=False, **_norm_cut(rows, columns))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """As `naive.layer_norm`."""
    rows, columns = x.shape
    _norm[(rows,)](x, weight, bias, out, columns, eps, CENTRED=True, **_norm_cut(rows, columns))


def quantise(x: Tensor, codes: Tensor, scales: Tensor, *, format: str) -> None:
    """As `naive.quantise`, code by code. Raises UnavailableError for a format without kernel."""
    rows, columns = x.shape
    kind = formats.get(format)
    element = kind.element_type
    if element is None or kind.scale_dtype == torch.float16:
        raise UnavailableError(f"no CUDA kernel quantises activations to {kind}")
    dtype = element.dtype
    grid = {"TOP": element.top, "MANTISSA": element.mantissa, "STEP": element.step}
    if kind.group is None:
        cut = _cut(rows, columns)
        share, shares = cut["BLOCK"], 1
        if rows <= _FEW:
            block = min(2 * _WHOLE, triton.next_power_of_2(columns))
            share = min(_SHARE, block)
            shares = triton.cdiv(columns, share)
            cut |= {"BLOCK": block, "num_warps": _warps(block, 32)}
        wide = codes.dtype == torch.float16
        _quantise[(rows, shares)](
            *(x, codes if wide else codes.view(dtype), scales, columns),
            **grid,
            HARDWARE=not INTERPRETED and capability() >= 89,
            SHARE=share,
            **cut,
        )
        return
    groups = kind.groups(columns)
    block = min(_BLOCK // kind.group, triton.next_power_of_2(groups))
    _quantise_blocks[(rows, triton.cdiv(groups, block))](
        *(x, codes.view(dtype), scales, columns, groups),
        **grid,
        EXPONENT=element.exponent,
        GROUP=kind.group,
        BLOCK=block,
        **overlap(),
    )


def rotary(
    x: Tensor, frequencies: Tensor, out: Tensor, *, head_dim: int, start: int, seq_len: int
) -> None:
    """As `naive.rotary`."""
    rows, columns = x.shape
    heads = columns // head_dim
    block = min(8, triton.next_power_of_2(heads))
    _rotary[(rows, triton.cdiv(heads, block))](
        *(x, frequencies, out, heads, start, seq_len),
        D=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=block,
        num_warps=4,
        **overlap(),
    )


def _norm_cut(rows: int, columns: int) -> dict[str, Any]:
    whole = columns <= _WHOLE
    cut = _cut(rows, columns)
    if whole:
        block = triton.next_power_of_2(columns)
        cut |= {"BLOCK": block, "num_warps": _warps(block, 32 if rows <= _FEW else 8)}
    return cut | {"WHOLE": whole}


def _cut(rows: int, columns: int) -> dict[str, Any]:
    """Few rows leave most processors idle: each then has as many warps as there may be."""
    most, warps = (_WHOLE, 32) if rows <= _FEW else (_BLOCK, 8)
    block = min(most, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": _warps(block, warps), **overlap()}


def _warps(block: int, most: int) -> int:
    return max(1, min(most, block // 512))
