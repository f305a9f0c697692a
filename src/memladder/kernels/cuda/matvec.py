"""One token's product: every weight is read once, and nothing else counts.

A program has some output channels and all of K. A thread reads 16 bytes of a row at once; what it
unpacks of them it multiplies there, and the sums meet at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder.formats.elements import ELEMENTS
from memladder.formats.fp8 import Fp8
from memladder.formats.mxfp8 import Mxfp8
from memladder.kernels.cuda.decode import affine, decoded, dot_ptx, numbers
from memladder.kernels.cuda.epilogue import finished, power
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import INTERPRETED
from memladder.kernels.layout import Layout

_DP4A = "dp4a.u32.s32 $0, $1, $2, $3;"


@triton.jit
def _units(x, at, units, EVEN: tl.constexpr):
    """32 bits of x each."""
    if EVEN:
        return tl.load(x + at)
    return tl.load(x + at, mask=at < units, other=0)


@triton.jit
def _dot4(x, at, units, bits, sums, total, PTX: tl.constexpr, EVEN: tl.constexpr):
    """sums + bits · x, four bytes each, and total + 1 · x."""
    some = _units(x, at, units, EVEN)
    if PTX != "":
        sums = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [bits, some[None, :], sums],
                                         dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
        total = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [0x01010101, some, total],
                                          dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        for lane in tl.static_range(4):
            token = (some << (24 - 8 * lane)) >> 24
            sums += ((bits >> (8 * lane)) & 0xFF) * token[None, :]
            total += token
    return sums, total


@triton.jit
def _words(x, weight, w_scales, x_scales, bias, factor, residual, out, N, units, tiles, groups,
           BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
           INTERLEAVED: tl.constexpr, TILE_ROWS: tl.constexpr, NUMBERS: tl.constexpr,
           STEP: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr,
           INTEGER: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
           FACTOR: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
           ROWS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.where(n < N, n, 0)
    word = tl.arange(0, TILES * 16)
    tile = word // 16
    # x is read as 32 bits, LANES numbers: those of pair 0 of each word; the next pair's lie 4 on.
    unit = tile * (16 * PAIRS) + (word % 4) * (4 * PAIRS) + (word % 16) // 4
    row = (own // TILE_ROWS).to(tl.int64) * tiles * (TILE_ROWS * 16) + (own % TILE_ROWS) * 16
    at = row[:, None] + (tile * (TILE_ROWS * 16) + word % 16)[None, :]
    # How many groups a tile has, and how many of a chunk's four words one group.
    CODES: tl.constexpr = 16 * PAIRS * LANES
    PARTS: tl.constexpr = CODES // GROUP if GROUP > 0 and GROUP < CODES else 1
    acc = tl.zeros((ROWS, TILES * 16), tl.int32 if INTEGER else tl.float32)
    if INTEGER:
        twos = tl.zeros((ROWS, TILES * 16), tl.int32)
        fours = tl.zeros((ROWS, TILES * 16), tl.int32)
        eights = tl.zeros((ROWS, TILES * 16), tl.int32)
        total = tl.zeros((TILES * 16,), tl.int32)
    for start in range(0, tiles, TILES):
        if EVEN:
            words = tl.load(weight + at)
        else:
            words = tl.load(weight + at, mask=(tile < tiles - start)[None, :], other=0)
        first = start * (16 * PAIRS) + unit
        if INTEGER:
            # Four bits times four numbers at once, where they lie in their bytes: their sums then
            # are 1, 2, 4 or 8 times as large, and a shift serves four of them.
            for half in tl.static_range(2):
                bits = words >> 4 * half
                here = first + 16 * half
                acc, total = _dot4(x, here, units, bits & 0x01010101, acc, total, PTX, EVEN)
                twos, total = _dot4(x, here + 4, units, bits & 0x02020202, twos, total, PTX, EVEN)
                fours, total = _dot4(x, here + 8, units, bits & 0x04040404, fours, total, PTX, EVEN)
                eights, total = _dot4(x, here + 12, units, bits & 0x08080808, eights, total, PTX,
                                      EVEN)  # fmt: skip
        elif PTX != "":
            sums = tl.inline_asm_elementwise(
                PTX, "=f,r,r,r,r,r",
                [words, _units(x, first, units, EVEN)[None, :],
                 _units(x, first + 4, units, EVEN)[None, :],
                 _units(x, first + 8, units, EVEN)[None, :],
                 _units(x, first + 12, units, EVEN)[None, :]],
                dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
        else:
            sums = tl.zeros((ROWS, TILES * 16), tl.float32)
            for pair in tl.static_range(PAIRS):
                some = _units(x, first + 4 * pair, units, EVEN)
                for lane in tl.static_range(LANES):
                    bit = BITS * (LANES * pair + lane)
                    if INTERLEAVED:
                        bit = BITS * pair + (32 // LANES) * lane
                    values = decoded((words >> bit) & ((1 << BITS) - 1), NUMBERS, STEP, OFFSET)
                    half = ((some >> 16 * lane) & 0xFFFF).to(tl.int16)
                    sums += values * half.to(tl.float16, bitcast=True).to(tl.float32)[None, :]
        if GROUP > 0:
            group = (start + tl.arange(0, TILES))[:, None] * (16 * PAIRS * LANES)
            group = (group + tl.arange(0, PARTS)[None, :] * GROUP) // GROUP
            group = tl.minimum(group, groups - 1)
            scale = tl.load(w_scales + group[None, :, :] * N + own[:, None, None])
            sums = tl.reshape(sums, (ROWS, TILES, 4, PARTS, 4 // PARTS))
            sums *= scale.to(tl.float32)[:, :, None, :, None]
            sums = tl.reshape(sums, (ROWS, TILES * 16))
        if not INTEGER:
            acc += sums
        at += TILES * TILE_ROWS * 16
    if INTEGER:
        # ±1 is twice the bit less one.
        acc = 2 * acc + twos + (fours >> 1) + (eights >> 2)
        result = (tl.sum(acc, axis=1) - tl.sum(total)).to(tl.float32)
    else:
        result = tl.sum(acc, axis=1).to(tl.float32)
    if GROUP == 0:
        result *= tl.load(w_scales + own).to(tl.float32)
    if INTEGER:
        result *= tl.load(x_scales)
    finished(result, n, own, n < N, bias, factor, residual, out,
             ACTIVATION, BIAS, FACTOR, RESIDUAL)  # fmt: skip


@triton.jit
def _whole(x, weight, w_scales, x_scales, bias, factor, residual, out, N, K, stride, top,
           GROUP: tl.constexpr, ROW_SCALE: tl.constexpr, X_SCALE: tl.constexpr,
           ACTIVATION: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
           RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.where(n < N, n, 0)
    k = tl.arange(0, BLOCK)
    at = own[:, None].to(tl.int64) * stride + k[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        values = tl.load(weight + at, mask=inside[None, :], other=0.0).to(tl.float16)
        tokens = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float16).to(tl.float32)
        if GROUP > 0:
            group = tl.minimum(start // GROUP + tl.arange(0, BLOCK // GROUP), tl.cdiv(K, GROUP) - 1)
            w_scale = power(tl.load(w_scales + group[None, :] * N + own[:, None]), top)
            x_scale = power(tl.load(x_scales + group), 127)
            tokens = tl.reshape(tokens, (BLOCK // GROUP, GROUP)) * x_scale[:, None]
            values = tl.reshape(values.to(tl.float32), (ROWS, BLOCK // GROUP, GROUP))
            values *= w_scale[:, :, None]
            acc += tl.reshape(values * tokens[None, :, :], (ROWS, BLOCK))
        else:
            acc += values.to(tl.float32) * tokens[None, :]
        at += BLOCK
    result = tl.sum(acc, axis=1)
    if ROW_SCALE:
        result *= tl.load(w_scales + own).to(tl.float32)
    if X_SCALE:
        result *= tl.load(x_scales)
    if GROUP > 0:
        result *= power(top, 127)
    finished(result, n, own, n < N, bias, factor, residual, out,
             ACTIVATION, BIAS, FACTOR, RESIDUAL)  # fmt: skip


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual; False where there is no such kernel."""
    if operand.rows != 1:
        return False
    x, scales, kind = operand.x, operand.scales, operand.format
    weight, out, bias = part.weight, part.out, part.bias
    factor: Tensor | None = None
    layout, own = weight.layout, weight.format
    epilogue = {
        "ACTIVATION": activation,
        "BIAS": bias is not None,
        "FACTOR": factor is not None,
        "RESIDUAL": residual is not None,
    }
    pointers = (x if part is None else part for part in (bias, factor, residual))
    x_scales = x if scales is None else scales
    w_scales = x if weight.scales is None else weight.scales
    columns = layout.columns
    if layout.is_packed:
        integer = own.bits == 1 and kind.is_integer
        group = own.group or 0
        parts = layout.tile_columns // group if group else 1
        if (
            columns % layout.lanes
            or own.is_integer != integer
            or (kind.bits == 16) == integer
            or own.has_zeros
            or own.scale_dtype == torch.uint8
            or parts > 4
        ):
            return False
        values = numbers(str(own))
        even = affine(values)
        # Programs enough for all processors, and rows enough that an activation is read for some.
        rows, tiles = max(4, min(32, triton.next_power_of_2(layout.rows) // 128)), 4
        _words[(triton.cdiv(layout.rows, rows),)](
            *(x.view(torch.int32), weight.codes.view(torch.int32), w_scales, x_scales),
            *pointers,
            *(out, layout.rows, columns // layout.lanes, layout.shape[1], own.groups(columns)),
            BITS=own.bits,
            PAIRS=layout.pairs,
            LANES=layout.lanes,
            INTERLEAVED=layout.interleaved,
            TILE_ROWS=layout.tile_rows,
            NUMBERS=values,
            STEP=even[0] if even else 0.0,
            OFFSET=even[1] if even else 0.0,
            PTX=_ptx(own, layout, integer),
            GROUP=group,
            INTEGER=integer,
            **epilogue,
            EVEN=columns % (tiles * layout.tile_columns) == 0,
            ROWS=rows,
            TILES=tiles,
            num_warps=4,
        )
        return True
    if own.bits == 16 and kind.bits == 16:
        codes, tokens, group = weight.codes.view(torch.float16), x, 0
    elif isinstance(own, (Fp8, Mxfp8)) and isinstance(kind, type(own)):
        codes = weight.codes.view(ELEMENTS[own.element].dtype)
        tokens = x.view(ELEMENTS[kind.element].dtype)
        group = own.group or 0
    else:
        return False
    block = min(1024, triton.next_power_of_2(columns))
    _whole[(triton.cdiv(layout.rows, 4),)](
        *(tokens, codes, w_scales, x_scales, *pointers, out),
        *(layout.rows, columns, layout.shape[1] * layout.tile_columns, weight.top if group else 0),
        GROUP=group,
        ROW_SCALE=isinstance(own, Fp8),
        X_SCALE=isinstance(own, Fp8),
        **epilogue,
        ROWS=4,
        BLOCK=max(block, group),
        num_warps=4,
    )
    return True


def _ptx(own: Format, layout: Layout, integer: bool) -> str:
    if integer:
        return "" if INTERPRETED else _DP4A
    return dot_ptx(str(own), layout.interleaved)


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up; False where there is no such kernel."""
    return False


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights in one launch; False where there is no such kernel."""
    return False
