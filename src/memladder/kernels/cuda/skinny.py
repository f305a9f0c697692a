"""Products of few rows (2 to 64): reading the weights is what takes the time.

The weight is the tensor cores' first operand and comes from registers, unpacked there
(`kernels.layout`). A program has many output channels, so that activations, which every program
reads again, are few beside its weights; where that leaves processors without work it has a part of
K only. Parts of a sum go to the workspace, and the program that comes last adds them up, always in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.formats._shared.base import Format
from memladder.kernels.cuda.decode import affine, numbers, stretch, unpack_ptx, unpacked
from memladder.kernels.cuda.epilogue import activated, finished
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import INTERPRETED, has_wgmma, overlap, prefetch, wait
from memladder.kernels.cuda.tuning import choice

WORKSPACE_BYTES = 8 << 20
"""Of the workspace, which holds parts of sums."""

MOST_ROWS = 64

# Of the workspace, how many count programs: one int32 for every block of channels.
_COUNTERS = 4096
_workspace: list[Tensor] = []


def set_workspace(tensor: Tensor | None) -> None:
    """Use this memory, uint8 [WORKSPACE_BYTES] of zeros on the GPU, for parts of sums; None for
    products that are not divided along K. Every launch leaves its counters at zero."""
    _workspace[:] = [] if tensor is None else [tensor]


@triton.jit
def _scales(at, tile, groups, N, CODES: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """[rows, PARTS] scales of a tile."""
    group = tile * CODES // GROUP
    found = tl.load(at + tl.minimum(group, groups - 1) * N)
    if PARTS == 2:
        other = tl.load(at + tl.minimum(group + 1, groups - 1) * N)
        found = tl.join(found, other)
    else:
        found = found[:, None]
    return found


@triton.jit
def _few(x, x_scales, residual, scratch, weight0, scales0, bias0, out0, N0,
         weight1, scales1, bias1, out1, N1, weight2, scales2, bias2, out2, N2,
         M, K, tiles, groups, per_split, COUNTERS: tl.constexpr, PARTS: tl.constexpr,
         GATED: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
         INTERLEAVED: tl.constexpr, TILE_ROWS: tl.constexpr, NUMBERS: tl.constexpr,
         STRETCH: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr,
         GROUP: tl.constexpr,
         INTEGER: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
         RESIDUAL: tl.constexpr, COPIED: tl.constexpr, FENCE: tl.constexpr, PDL: tl.constexpr,
         TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
         STAGES: tl.constexpr):  # fmt: skip
    CHANNELS: tl.constexpr = ROWS // 2 if GATED else ROWS
    CODES: tl.constexpr = 16 * PAIRS * LANES
    block = tl.program_id(0)
    pid = block
    weight, w_scales, bias, out, N = weight0, scales0, bias0, out0, N0
    if PARTS > 1:
        blocks = tl.cdiv(N, CHANNELS)
        if pid >= blocks:
            pid -= blocks
            weight, w_scales, bias, out, N = weight1, scales1, bias1, out1, N1
            if PARTS > 2:
                blocks = tl.cdiv(N, CHANNELS)
                if pid >= blocks:
                    pid -= blocks
                    weight, w_scales, bias, out, N = weight2, scales2, bias2, out2, N2
    row = tl.arange(0, ROWS)
    if GATED:
        # Eight rows of the gate, then the same of the other: a thread of the tensor cores has rows
        # r and r + 8, and multiplies in the end what it has.
        n = pid * CHANNELS + row // 16 * 8 + row % 8
        weights = tl.where(row // 8 % 2 == 1, weight1, weight0)
        scale_at = tl.where(row // 8 % 2 == 1, scales1, scales0)
    else:
        n = pid * CHANNELS + row
        weights, scale_at = weight, w_scales
    own = tl.where(n < N, n, 0)
    scale_at = scale_at + own
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, tiles)
    at = (own // TILE_ROWS).to(tl.int64) * tiles * (TILE_ROWS * 16) + (own % TILE_ROWS) * 16
    at = weights + (at + first * (TILE_ROWS * 16))
    at = at[:, None] + tl.arange(0, 16)[None, :]
    m = tl.arange(0, TOKENS)
    k = tl.arange(0, CODES)
    own_m = tl.where(m < M, m, 0)
    SHARES: tl.constexpr = CODES // GROUP if GROUP > 0 and GROUP < CODES else 1
    if GROUP > 0:
        following = _scales(scale_at, first, groups, N, CODES, GROUP, SHARES)
    wait(PDL)
    acc = tl.zeros((ROWS, TOKENS), tl.int32 if INTEGER else tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        if COPIED:
            tokens = x.load([0, tile * CODES])
        else:
            inside = tile * CODES + k < K
            tokens = tl.load(x + own_m[:, None] * K + (tile * CODES + k)[None, :],
                             mask=inside[None, :], other=0)  # fmt: skip
        words = tl.load(at, eviction_policy="evict_first")
        values = unpacked(words, ROWS, 1, BITS, PAIRS, LANES, INTERLEAVED,
                          NUMBERS, STEP, OFFSET, PTX, INTEGER)  # fmt: skip
        if GROUP > 0:
            values = tl.reshape(values, (ROWS, SHARES, CODES // SHARES)) * following[:, :, None]
            values = tl.reshape(values, (ROWS, CODES))
            # Scales are too narrow for asynchronous copies: the next ones are loaded once these
            # are used, and later ones are brought near.
            following = _scales(scale_at, tile + 1, groups, N, CODES, GROUP, SHARES)
            for share in tl.static_range(SHARES):
                later = tl.minimum((tile + 6) * CODES // GROUP + share, groups - 1)
                prefetch(scale_at + later * N, PDL)
        if INTEGER:
            acc = tl.dot(values, tl.trans(tokens), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(values, tl.trans(tokens), acc)
        if FENCE:
            # Triton 3.6 does not wait for products whose operand lies in registers before the
            # next step overwrites them, unless something looks at the sums.
            acc = tl.inline_asm_elementwise("", "=r,0" if INTEGER else "=f,0", [acc],
                                            dtype=acc.dtype, is_pure=True, pack=1)  # fmt: skip
        at += TILE_ROWS * 16
    if SPLIT > 1:
        parts = scratch + COUNTERS + block * (SPLIT * ROWS * TOKENS)
        parts += row[:, None] * TOKENS + m[None, :]
        bits = acc if INTEGER else acc.to(tl.int32, bitcast=True)
        tl.store(parts + tl.program_id(1) * (ROWS * TOKENS), bits, cache_modifier=".cg")
        tl.debug_barrier()
        before = tl.atomic_add(scratch + block, 1, sem="acq_rel")
        if before < SPLIT - 1:
            return
        tl.store(scratch + block, 0)
        acc = tl.zeros((ROWS, TOKENS), tl.int32 if INTEGER else tl.float32)
        for part in tl.static_range(SPLIT):
            bits = tl.load(parts + part * (ROWS * TOKENS), cache_modifier=".cg")
            acc += bits if INTEGER else bits.to(tl.float32, bitcast=True)
    result = tl.trans(acc).to(tl.float32)
    if STRETCH != 1:
        result *= 1 / STRETCH
    if GROUP == 0:
        result *= tl.load(scale_at).to(tl.float32)[None, :]
    if INTEGER:
        result *= tl.load(x_scales + own_m).to(tl.float32)[:, None]
    if GATED:
        SHAPE: tl.constexpr = (TOKENS, ROWS // 16, 2, 8)
        gate, up = tl.split(tl.permute(tl.reshape(result, SHAPE), (0, 1, 3, 2)))
        gate = tl.reshape(gate, (TOKENS, CHANNELS))
        up = tl.reshape(up, (TOKENS, CHANNELS))
        n = pid * CHANNELS + tl.arange(0, CHANNELS)
        own = tl.where(n < N, n, 0)
        if BIAS:
            gate += tl.load(bias0 + own).to(tl.float32)[None, :]
            up += tl.load(bias1 + own).to(tl.float32)[None, :]
        result = activated(gate, ACTIVATION) * up
        tl.store(out + m[:, None] * N + n[None, :], result.to(tl.float16),
                 mask=(m < M)[:, None] & (n < N)[None, :])  # fmt: skip
    else:
        finished(result, m[:, None] * N + n[None, :], own[None, :],
                 (m < M)[:, None] & (n < N)[None, :], bias, residual, out,
                 ACTIVATION, BIAS, RESIDUAL)  # fmt: skip


@dataclass(frozen=True)
class SkinnyCut:
    """Rows of weights of a program, and how many programs there should be: if there are fewer,
    K is divided. Its warps and stages."""

    rows: int
    programs: int
    warps: int
    stages: int


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual; False where there is no such kernel."""
    return _run(operand, [part], False, activation, residual)


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up; False where there is no such kernel."""
    alike = gate.weight.layout == up.weight.layout and gate.weight.format == up.weight.format
    same = (gate.bias is None) == (up.bias is None)
    return alike and same and _run(operand, [gate, up], True, activation, None)


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights in one launch; False where there is no such kernel."""
    kinds = {(part.weight.format, part.weight.columns, part.bias is None) for part in parts}
    tiles = {part.weight.layout.tile_rows for part in parts}
    return len(kinds) == len(tiles) == 1 and _run(operand, parts, False, "", None)


def _run(
    operand: Operand, parts: Sequence[Part], pair: bool, activation: str, residual: Tensor | None
) -> bool:
    weight, kind, x = parts[0].weight, operand.format, operand.x
    layout, own = weight.layout, weight.format
    rows, columns, group = operand.rows, layout.columns, own.group or 0
    integer = own.bits == 1 and kind.is_integer
    if (
        not has_wgmma()
        or not layout.is_packed
        or not 2 <= rows <= MOST_ROWS
        or len(parts) > 3
        or own.is_integer != integer
        or (kind.bits == 16) == integer
        or own.has_zeros
        or own.scale_dtype == torch.uint8
        or (group and layout.tile_columns // group > 2)
    ):
        return False
    tokens = max(16, triton.next_power_of_2(rows))
    cut = choice("skinny", _shape(parts, pair, tokens), _cuts(own, pair))
    channels = cut.rows // 2 if pair else cut.rows
    counted = parts[:1] if pair else parts
    grid = sum(triton.cdiv(part.weight.rows, channels) for part in counted)
    tiles = layout.shape[1]
    # As many parts as the workspace holds of all sums; steps enough that a pipeline fills.
    fitting = (WORKSPACE_BYTES // 4 - _COUNTERS) // (grid * cut.rows * tokens)
    split = min(cut.programs // grid, fitting, tiles // 4) if _workspace else 1
    per_split = triton.cdiv(tiles, max(1, split))
    split = triton.cdiv(tiles, per_split)
    values = numbers(str(own))
    even = affine(values)
    element = torch.int8 if integer else torch.float16
    given: Any = x.view(element)
    copied = columns * element.itemsize % 16 == 0
    if copied:
        box = [tokens, layout.tile_columns]
        given = TensorDescriptor(given, [rows, columns], [columns, 1], box)
    matrices: list[Any] = []
    for number in range(3):
        part = parts[min(number, len(parts) - 1)]
        scales = x if part.weight.scales is None else part.weight.scales
        bias = x if part.bias is None else part.bias
        matrices += [part.weight.codes.view(torch.int32), scales, bias, part.out, part.weight.rows]
    _few[(grid, split)](
        given,
        x if operand.scales is None else operand.scales,
        x if residual is None else residual,
        _workspace[0].view(torch.int32) if split > 1 else x,
        *matrices,
        *(rows, columns, tiles, own.groups(columns), per_split),
        COUNTERS=_COUNTERS,
        PARTS=1 if pair else len(parts),
        GATED=pair,
        BITS=own.bits,
        PAIRS=layout.pairs,
        LANES=layout.lanes,
        INTERLEAVED=layout.interleaved,
        TILE_ROWS=layout.tile_rows,
        NUMBERS=values,
        STRETCH=stretch(str(own)),
        STEP=even[0] if even else 0.0,
        OFFSET=even[1] if even else 0.0,
        PTX="" if integer else unpack_ptx(str(own), layout.interleaved),
        GROUP=group,
        INTEGER=integer,
        ACTIVATION=activation,
        BIAS=parts[0].bias is not None,
        RESIDUAL=residual is not None,
        COPIED=copied,
        FENCE=not INTERPRETED,
        **overlap(),
        TOKENS=tokens,
        ROWS=cut.rows,
        SPLIT=split,
        STAGES=cut.stages,
        num_warps=cut.warps,
    )
    return True


def _shape(parts: Sequence[Part], pair: bool, tokens: int) -> str:
    weight = parts[0].weight
    rows = sum(part.weight.rows for part in parts)
    return f"{weight.format} {tokens} {'gated ' * pair}{rows}x{weight.columns}"


def _cuts(own: Format, pair: bool) -> Sequence[SkinnyCut]:
    if own.bits == 1:
        return (
            [SkinnyCut(128, 1, 4, 5), SkinnyCut(64, 1, 4, 5)]
            if pair
            else [SkinnyCut(64, 320, 4, 5)]
        )
    return (
        [SkinnyCut(128, 1, 4, 5), SkinnyCut(128, 1, 4, 4)] if pair else [SkinnyCut(128, 384, 4, 4)]
    )
