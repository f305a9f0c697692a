"""One row times packed weights: what a thread unpacks it multiplies where it is.

A thread reads 16 bytes of a row of the weight at once, and the next ones before it multiplies them;
the sums meet at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder.formats._shared.base import Format
from memladder.kernels.cuda.decode import (
    affine,
    decoded,
    dot_ptx,
    lookup,
    numbers,
    pairs_ptx,
    stretch,
)
from memladder.kernels.cuda.one_row import RowCut, channels, finish, matrices, part_of, shape_class
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import INTERPRETED, wait
from memladder.kernels.cuda.tuning import choice
from memladder.kernels.layout import Layout

_DP4A = "dp4a.u32.s32 $0, $1, $2, $3;"
# Tensor cores want four neighbouring lanes to have a row between them. Triton 3.6 lays `_words` out
# so, 3.9 does not.
_LANES_IN_ORDER = triton.__version__.startswith("3.6.")
# A warp's 16 rows, eight and eight, of which a lane has the pairs $4, $6 and $5, $7, times the same
# activations in all of the tensor core's eight columns: so all four lanes of a row end up with its
# sum, $0 and $1 or $2 and $3 (PTX ISA, section "Matrix fragments for mma.m16n8k16").
_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7},"
    " {$8, $9}, {$10, $11, $12, $13};"
)


@triton.jit
def _units(x, at, units, EVEN: tl.constexpr):
    """32 bits of x each, for all rows: [4, TILES] as [4, 1, TILES, 1]."""
    some = tl.load(x + at) if EVEN else tl.load(x + at, mask=at < units, other=0)
    return some[:, None, :, None]


@triton.jit
def _dot4(bits, some, sums, PTX: tl.constexpr):
    """sums + bits · some, four bytes each, `some` signed."""
    if PTX != "":
        sums = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [bits, some, sums],
                                         dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        for lane in tl.static_range(4):
            sums += ((bits >> (8 * lane)) & 0xFF) * ((some << (24 - 8 * lane)) >> 24)
    return sums


@triton.jit
def _bits(word, x, at, units, ones, twos, fours, eights, total, PTX: tl.constexpr,
          EVEN: tl.constexpr):  # fmt: skip
    """The 32 bits of a word times numbers of x: four at once, where they lie in their bytes. Their
    sums then are 1, 2, 4 or 8 times as large, and a shift serves four of them. And the sum of x."""
    for half in tl.static_range(2):
        bits = word >> 4 * half
        here = at + 16 * half
        some = _units(x, here, units, EVEN)
        ones = _dot4(bits & 0x01010101, some, ones, PTX)
        total = _dot4(0x01010101, some, total, PTX)
        some = _units(x, here + 4, units, EVEN)
        twos = _dot4(bits & 0x02020202, some, twos, PTX)
        total = _dot4(0x01010101, some, total, PTX)
        some = _units(x, here + 8, units, EVEN)
        fours = _dot4(bits & 0x04040404, some, fours, PTX)
        total = _dot4(0x01010101, some, total, PTX)
        some = _units(x, here + 12, units, EVEN)
        eights = _dot4(bits & 0x08080808, some, eights, PTX)
        total = _dot4(0x01010101, some, total, PTX)
    return ones, twos, fours, eights, total


@triton.jit
def _dot(word, x, at, units, sums, BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
         INTERLEAVED: tl.constexpr, NUMBERS: tl.constexpr, STEP: tl.constexpr,
         OFFSET: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """sums + the numbers of a word · those of x."""
    if PTX != "":
        sums += tl.inline_asm_elementwise(
            PTX, "=f,r,r,r,r,r",
            [word, _units(x, at, units, EVEN), _units(x, at + 4, units, EVEN),
             _units(x, at + 8, units, EVEN), _units(x, at + 12, units, EVEN)],
            dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    else:
        for pair in tl.static_range(PAIRS):
            some = _units(x, at + 4 * pair, units, EVEN)
            for lane in tl.static_range(LANES):
                bit = BITS * (LANES * pair + lane)
                if INTERLEAVED:
                    bit = BITS * pair + (32 // LANES) * lane
                values = decoded((word >> bit) & ((1 << BITS) - 1), NUMBERS, STEP, OFFSET)
                half = ((some >> 16 * lane) & 0xFFFF).to(tl.int16)
                sums += values * half.to(tl.float16, bitcast=True).to(tl.float32)
    return sums


@triton.jit
def _cores(word, x, at, units, sums, PTX: tl.constexpr, EVEN: tl.constexpr):
    """As `_dot`, on tensor cores: two equal sums of even and two of odd blocks of eight rows."""
    TILES: tl.constexpr = word.shape[2]
    HALF: tl.constexpr = word.shape[3] // 2
    pairs = tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r", [word], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True, pack=1)  # fmt: skip
    for half in tl.static_range(2):
        low, high = tl.split(tl.reshape(pairs[2 * half], (4, 8, TILES, HALF, 2)))
        next_low, next_high = tl.split(tl.reshape(pairs[2 * half + 1], (4, 8, TILES, HALF, 2)))
        sums = tl.inline_asm_elementwise(
            _MMA, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [low, high, next_low, next_high, _units(x, at + 8 * half, units, EVEN),
             _units(x, at + 8 * half + 4, units, EVEN), sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
            pack=1)  # fmt: skip
    return sums


@triton.jit
def _where_lanes_are(chunk, row):
    """Zeros where lanes lie as tensor cores take them, four to a row; NaN if the compiler has laid
    them out otherwise."""
    wanted = chunk + 4 * row
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [wanted], dtype=tl.int32,
                                     is_pure=True, pack=1)  # fmt: skip
    return tl.where(lane == wanted, 0.0, float("nan"))


@triton.jit
def _words(x, x_scales, residual, weight0, scales0, bias0, out0, N0, weight1, scales1, bias1, out1,
           N1, weight2, scales2, bias2, out2, N2, units, tiles, groups,
           PARTS: tl.constexpr, GATED: tl.constexpr,
           BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
           INTERLEAVED: tl.constexpr, TILE_ROWS: tl.constexpr, NUMBERS: tl.constexpr,
           STRETCH: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr,
           GROUP: tl.constexpr,
           INTEGER: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
           ROWS: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr,
           CORES: tl.constexpr):  # fmt: skip
    pid, weight, w_scales, bias, out, N = part_of(
        ROWS, PARTS, (weight0, scales0, bias0, out0, N0),
        (weight1, scales1, bias1, out1, N1), (weight2, scales2, bias2, out2, N2))  # fmt: skip
    # Blocks of eight rows.
    BLOCKS: tl.constexpr = (2 if GATED else 1) * ROWS // 8
    rows = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, BLOCKS)[None, :]
    n, own, second = channels(pid, rows, N, ROWS)
    tile = tl.arange(0, TILES)
    row = (own // TILE_ROWS).to(tl.int64) * tiles * (TILE_ROWS * 16) + (own % TILE_ROWS) * 16
    scale_at = own.to(tl.int64)
    if GATED:
        row = tl.where(second, weight1, weight0) + row
        scale_row = tl.where(second, scales1, scales0) + scale_at
    else:
        row, scale_row = weight + row, w_scales + scale_at
    # [4, 8, TILES, blocks, 4]: of a row of a tile four threads have four words each; a warp has
    # eight rows.
    chunk = tl.arange(0, 4)
    at = row[None, :, None, :, None]
    at += (chunk * 4)[:, None, None, None, None] + tl.arange(0, 4)[None, None, None, None, :]
    at += (tile * (TILE_ROWS * 16))[None, None, :, None, None]
    # As if they were not contiguous: every thread is to load the scales of its own rows.
    scale_at = tl.max_contiguous(scale_row, (1, 1))[None, :, None, :]
    scale_at += 0 * chunk[:, None, None, None]
    # x is read as 32 bits, LANES numbers: a thread's first; its next ones lie 4 on.
    unit = tile[None, :] * (16 * PAIRS) + chunk[:, None]
    # How many groups a tile has, and how many of a chunk's four words one group.
    CODES: tl.constexpr = 16 * PAIRS * LANES
    GROUPS: tl.constexpr = CODES // GROUP if GROUP > 0 and GROUP < CODES else 1
    words = tl.load(at, mask=(tile < tiles)[None, None, :, None, None], other=0,
                    eviction_policy="evict_first")  # fmt: skip
    lookup(NUMBERS, PTX, INTERLEAVED or INTEGER)
    wait(PDL)
    acc = tl.zeros((4, 8, TILES, BLOCKS), tl.int32 if INTEGER else tl.float32)
    twos = tl.zeros((4, 8, TILES, BLOCKS), tl.int32)
    fours = tl.zeros((4, 8, TILES, BLOCKS), tl.int32)
    eights = tl.zeros((4, 8, TILES, BLOCKS), tl.int32)
    total = tl.zeros((4, 1, TILES, 1), tl.int32)
    # Of tensor cores: sums of even and of odd blocks.
    nought = tl.zeros((4, 8, TILES, BLOCKS // 2 if CORES else BLOCKS), tl.float32)
    if CORES:
        nought += _where_lanes_are(chunk[:, None, None, None],
                                   tl.arange(0, 8)[None, :, None, None])  # fmt: skip
    one, other = nought, nought
    # Two steps: what was read for one lies in other registers than what is read for the next.
    for begin in range(0, tiles, STEPS * TILES):
        for step in tl.static_range(STEPS):
            start = begin + step * TILES
            at += TILES * TILE_ROWS * 16
            following = tl.load(at, mask=(tile < tiles - start - TILES)[None, None, :, None, None],
                                other=0, eviction_policy="evict_first")  # fmt: skip
            first = start * (16 * PAIRS) + unit
            even, odd = tl.split(tl.reshape(words, (4, 8, TILES, BLOCKS, 2, 2)))
            word0, word2 = tl.split(even)
            word1, word3 = tl.split(odd)
            sums = tl.zeros((4, 8, TILES, BLOCKS), tl.float32)
            zeros = tl.zeros_like(nought)
            products = (zeros, zeros, zeros, zeros)
            four = (word0, word1, word2, word3)
            for number in tl.static_range(4):
                word = four[number]
                if INTEGER:
                    acc, twos, fours, eights, total = _bits(
                        word, x, first + 32 * number, units, acc, twos, fours, eights, total, PTX,
                        EVEN)  # fmt: skip
                else:
                    here = first + number * (4 * PAIRS)
                    if CORES:
                        products = _cores(word, x, here, units, products, PTX, EVEN)
                    else:
                        sums = _dot(word, x, here, units, sums, BITS, PAIRS, LANES, INTERLEAVED,
                                    NUMBERS, STEP, OFFSET, PTX, EVEN)  # fmt: skip
                    if (number + 1) % (4 // GROUPS) == 0:
                        scale = tl.full((4, 8, TILES, BLOCKS), 1.0, tl.float32)
                        if GROUP > 0:
                            group = (start + tile) * CODES + number // (4 // GROUPS) * GROUP
                            group = tl.minimum(group // GROUP, groups - 1)
                            scale = tl.load(scale_at + (group * N)[None, None, :, None])
                            scale = scale.to(tl.float32)
                        if CORES:
                            scale, also = tl.split(
                                tl.reshape(scale, (4, 8, TILES, BLOCKS // 2, 2)))  # fmt: skip
                            one += products[0] * scale
                            other += products[2] * also
                            products = (zeros, zeros, zeros, zeros)
                        else:
                            acc += sums * scale
                            sums = tl.zeros_like(sums)
            words = following
    if INTEGER:
        # ±1 is twice the bit less one.
        acc = 2 * acc + twos + (fours >> 1) + (eights >> 2) - total
    if CORES:
        # All four lanes of a row have its sum.
        acc = tl.reshape(tl.join(one, other), (4, 8, TILES, BLOCKS)) * 0.25
    result = tl.sum(tl.sum(acc, axis=0), axis=1).to(tl.float32)
    if STRETCH != 1:
        result *= 1 / STRETCH
    if GROUP == 0:
        result *= tl.load(scale_row).to(tl.float32)
    if INTEGER:
        result *= tl.load(x_scales)
    finish(result, n, own, N, bias, bias1, residual, out, ROWS, GATED, ACTIVATION, BIAS, RESIDUAL)


def launch(
    operand: Operand, parts: Sequence[Part], given: Sequence[Tensor], options: dict[str, Any]
) -> bool:
    weight, kind = parts[0].weight, operand.format
    layout, own = weight.layout, weight.format
    integer = own.bits == 1 and kind.is_integer
    columns, group = layout.columns, own.group or 0
    if (
        columns % layout.lanes
        or own.is_integer != integer
        or (kind.bits == 16) == integer
        or own.has_zeros
        or own.scale_dtype == torch.uint8
        or (group and layout.tile_columns // group > 4)
    ):
        return False
    values = numbers(str(own))
    even = affine(values)
    pair = options["GATED"]
    cut = choice("matvec", shape_class(parts, pair), _packed_cuts(parts, pair))
    grid = sum(triton.cdiv(part.weight.rows, cut.rows) for part in parts)
    step = cut.warps * layout.tile_columns
    steps = 1 if columns % (2 * step) and columns % step == 0 else 2
    _words[(grid if options["PARTS"] > 1 else triton.cdiv(layout.rows, cut.rows),)](
        *(operand.x.view(torch.int32), *given),
        *matrices(parts, operand.x, torch.int32),
        *(columns // layout.lanes, layout.shape[1], own.groups(columns)),
        **options,
        BITS=own.bits,
        PAIRS=layout.pairs,
        LANES=layout.lanes,
        INTERLEAVED=layout.interleaved,
        TILE_ROWS=layout.tile_rows,
        NUMBERS=values,
        STRETCH=stretch(str(own)),
        STEP=even[0] if even else 0.0,
        OFFSET=even[1] if even else 0.0,
        PTX=_ptx(own, layout, integer, cut.cores),
        GROUP=group,
        INTEGER=integer,
        EVEN=columns % (steps * step) == 0,
        ROWS=cut.rows,
        TILES=cut.warps,
        STEPS=steps,
        CORES=cut.cores,
        num_warps=cut.warps,
    )
    return True


def _packed_cuts(parts: Sequence[Part], pair: bool) -> Sequence[RowCut]:
    """All that may be fastest somewhere; first what was on an H100, for the figure's layers."""
    weight = parts[0].weight
    bits, columns = weight.format.bits, weight.columns
    rows = sum(part.weight.rows for part in parts)
    long, many = columns > 16384, rows >= 16384
    if bits == 1:
        # An activation's bytes are many beside a weight's bits: they are read for more rows.
        if pair:
            return [RowCut(16, 1), RowCut(16, 2), RowCut(32, 1), RowCut(16, 4)]
        best = RowCut(64, 8) if long else RowCut(32, 2) if many else RowCut(32, 4)
        return _led_by(best, [RowCut(32, 4), RowCut(64, 8), RowCut(32, 2), RowCut(64, 2)])
    looked_up = not weight.layout.interleaved
    if pair:
        best, cuts = RowCut(16, 4, cores=True), [RowCut(8, 8), RowCut(8, 4), RowCut(16, 4)]
    else:
        cuts = [RowCut(16, 8), RowCut(16, 4), RowCut(32, 4), RowCut(32, 8), RowCut(8, 8)]
        # Enough has to be in flight also where rows are few.
        if looked_up:
            few = RowCut(32, 8, cores=True) if columns > 8192 else RowCut(16, 4, cores=True)
            best = RowCut(32, 4, cores=True) if rows > 8192 else few
        else:
            few = RowCut(16, 4, cores=long) if rows > 8192 else RowCut(16, 8)
            best = RowCut(32, 4, cores=True) if many else few
    if not (_LANES_IN_ORDER and pairs_ptx(str(weight.format), weight.layout.interleaved)):
        return _led_by(cuts[0] if best.cores else best, cuts)
    # Tensor cores take rows by 16. What is looked up is multiplied in float32 without them.
    cores = [replace(cut, cores=True) for cut in cuts if pair or cut.rows > 8]
    return _led_by(best, cores if looked_up else [*cuts, *cores])


def _led_by(best: RowCut, cuts: Sequence[RowCut]) -> Sequence[RowCut]:
    return sorted(cuts, key=lambda cut: cut != best)


def _ptx(own: Format, layout: Layout, integer: bool, cores: bool) -> str:
    if integer:
        return "" if INTERPRETED else _DP4A
    return (pairs_ptx if cores else dot_ptx)(str(own), layout.interleaved)
