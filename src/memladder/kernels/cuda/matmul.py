"""Products with packed weights: out = activation(x · Wᵀ + bias) + residual.

The weight is the product's first operand, its output channels the rows of the tensor core's tile:
so that it can come from registers, unpacked there in the order in which `kernels.layout` laid it
out, and so that a tile may have as few tokens as there are. One row is `matvec`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.core.errors import UnavailableError
from memladder.formats._shared.base import Format
from memladder.kernels.cuda import dense
from memladder.kernels.cuda.decode import affine, numbers, stretch, unpack_ptx, unpacked
from memladder.kernels.cuda.epilogue import activated, power, stored
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import INTERPRETED, has_wgmma, overlap, wait

# Fewer programs than an H100 or A100 has processors, about, and tiles become smaller.
_PROGRAMS = 96


@triton.jit
def _scales(scales, n, known, group, groups, N, PARTS: tl.constexpr):
    """[rows, PARTS] from `group` on. Two are loaded apart: at once where they are needed."""
    if PARTS == 2:
        own = tl.minimum(group, groups - 1) * N + n[:, None]
        first = tl.load(scales + own, mask=known, other=0)
        own = tl.minimum(group + 1, groups - 1) * N + n[:, None]
        second = tl.load(scales + own, mask=known, other=0)
        found = tl.reshape(tl.join(first, second), (n.shape[0], 2))
    else:
        part = tl.minimum(group + tl.arange(0, PARTS), groups - 1)
        found = tl.load(scales + part[None, :] * N + n[:, None], mask=known, other=0)
    return found


@triton.jit
def _scaled(x, m, n, M, N, x_scales, scales, top, bias, X_SCALE: tl.constexpr,
            ROW_SCALE: tl.constexpr, E8M0: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    own = tl.where(n < N, n, 0)
    if X_SCALE:
        x *= tl.load(x_scales + tl.where(m < M, m, 0)).to(tl.float32)[:, None]
    if ROW_SCALE:
        x *= tl.load(scales + own).to(tl.float32)[None, :]
    if E8M0:
        x *= power(top, 127)
    if BIAS:
        x += tl.load(bias + own).to(tl.float32)[None, :]
    return x


@triton.jit
def _matmul(x, x_scales, weight, w_scales, w_zeros, bias,
            up, up_scales, up_zeros, up_bias, residual, out,
            M, N, K, stride, tiles, groups, top, up_top,
            PACKED: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
            INTERLEAVED: tl.constexpr, TILE_ROWS: tl.constexpr, NUMBERS: tl.constexpr,
            STRETCH: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr,
            GROUP: tl.constexpr, E8M0: tl.constexpr, ZEROS: tl.constexpr, ROW_SCALE: tl.constexpr,
            X_GROUP: tl.constexpr, X_SCALE: tl.constexpr, OPERAND: tl.constexpr,
            ACTIVATION: tl.constexpr, BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
            GATED: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, COPIED: tl.constexpr,
            COPIED_WEIGHT: tl.constexpr, IMPRECISE: tl.constexpr, FENCE: tl.constexpr,
            PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    # Programs that share a weight follow each other: it is read from memory once.
    CHANNELS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    blocks = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % blocks) * BLOCK_M
    first_n = (tl.program_id(0) // blocks) * CHANNELS
    m = first_m + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)
    if GATED:
        # Eight rows of the gate, then the same of the other: a thread of the tensor cores has rows
        # r and r + 8, and multiplies in the end what it has.
        n = first_n + row // 16 * 8 + row % 8
        other = row // 8 % 2 == 1
        weight = tl.where(other, up, weight)
        g_scales = tl.where(other, up_scales, w_scales)[:, None]
        g_zeros = tl.where(other, up_zeros, w_zeros)[:, None]
    else:
        n = first_n + row
        g_scales, g_zeros = w_scales, w_zeros
    # Rows beyond the end repeat the first one; what they give is not stored.
    own_m = tl.where(m < M, m, 0)
    own_n = tl.where(n < N, n, 0)
    known = (n < N)[:, None]
    k = tl.arange(0, BLOCK_K)
    x_at = own_m[:, None].to(tl.int64) * K + k[None, :]
    if PACKED:
        # Words: a row of a tile has 16.
        TILES: tl.constexpr = BLOCK_K // (16 * PAIRS * LANES)
        word = tl.arange(0, TILES * 16)
        w_row = (own_n // TILE_ROWS).to(tl.int64) * tiles * (TILE_ROWS * 16)
        w_row += (own_n % TILE_ROWS) * 16
        w_at = ((word // 16) * (TILE_ROWS * 16) + word % 16)[None, :]
        w_at = (weight + w_row)[:, None] + w_at
    elif not COPIED_WEIGHT:
        w_at = (weight + own_n.to(tl.int64) * stride)[:, None] + k[None, :]
    wait(PDL)
    INTEGER: tl.constexpr = OPERAND == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    if GROUP > 0:
        SHARE: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
        PARTS: tl.constexpr = BLOCK_K // SHARE
    for start in range(0, K, BLOCK_K):
        if COPIED:
            tokens = x.load([first_m, start])
        elif EVEN:
            tokens = tl.load(x + x_at)
        else:
            tokens = tl.load(x + x_at, mask=(start + k < K)[None, :], other=0.0)
        if PACKED:
            if EVEN or TILES == 1:
                words = tl.load(w_at)
            else:
                left = tiles - start // (16 * PAIRS * LANES)
                words = tl.load(w_at, mask=(word // 16 < left)[None, :], other=0)
            values = unpacked(words, BLOCK_N, TILES, BITS, PAIRS, LANES, INTERLEAVED,
                              NUMBERS, STEP, OFFSET, PTX, INTEGER)  # fmt: skip
            w_at += TILES * TILE_ROWS * 16
        else:
            if COPIED_WEIGHT:
                values = weight.load([first_n, start])
            else:
                if EVEN:
                    values = tl.load(w_at)
                else:
                    values = tl.load(w_at, mask=(start + k < K)[None, :], other=0.0)
                w_at += BLOCK_K
            values = values.to(OPERAND)
        if GROUP > 0:
            group = start // GROUP
            scale = _scales(g_scales, n, known, group, groups, N, PARTS)
            if FENCE and not GATED:
                # Scales are too narrow for asynchronous copies: the next ones are at least fetched.
                # (Two weights' addresses take registers that there are not.)
                later = tl.minimum((start + BLOCK_K) // GROUP + tl.arange(0, PARTS), groups - 1)
                later = g_scales + later[None, :] * N + own_n[:, None]
                tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l",
                                          [later.to(tl.int64)], dtype=tl.int32, is_pure=False,
                                          pack=1)  # fmt: skip
            if E8M0:
                scale = power(scale, tl.where(other, up_top, top)[:, None] if GATED else top)
            scale = scale.to(OPERAND)
            values = tl.reshape(values, (BLOCK_N, PARTS, SHARE))
            if ZEROS:
                zeros = _scales(g_zeros, n, known, group, groups, N, PARTS)
                values -= zeros.to(OPERAND)[:, :, None]
            values = tl.reshape(values * scale[:, :, None], (BLOCK_N, BLOCK_K))
        if X_GROUP > 0:
            part = start // X_GROUP + tl.arange(0, BLOCK_K // X_GROUP)
            count = tl.cdiv(K, X_GROUP)
            s_at = own_m[:, None] * count + tl.minimum(part, count - 1)[None, :]
            scale = power(tl.load(x_scales + s_at), 127).to(OPERAND)
            tokens = tl.reshape(tokens.to(OPERAND), (BLOCK_M, BLOCK_K // X_GROUP, X_GROUP))
            tokens = tl.reshape(tokens * scale[:, :, None], (BLOCK_M, BLOCK_K))
        else:
            tokens = tokens.to(OPERAND)
        if INTEGER:
            acc = tl.dot(values, tl.trans(tokens), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(values, tl.trans(tokens), acc, max_num_imprecise_acc=IMPRECISE)
            if FENCE:
                # Triton 3.6 does not wait for products whose operand lies in registers before the
                # next step overwrites them, unless something looks at the sums.
                acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True,
                                                pack=1)  # fmt: skip
        x_at += BLOCK_K
    result = acc.to(tl.float32)
    if STRETCH != 1:
        result *= 1 / STRETCH
    if GATED:
        n = first_n + tl.arange(0, CHANNELS)
        result = tl.reshape(result, (BLOCK_N // 16, 2, 8, BLOCK_M))
        result, also = tl.split(tl.permute(result, (0, 2, 3, 1)))
        result = _scaled(tl.trans(tl.reshape(result, (CHANNELS, BLOCK_M))), m, n, M, N, x_scales,
                         w_scales, top, bias, X_SCALE, ROW_SCALE, E8M0, BIAS)  # fmt: skip
        also = _scaled(tl.trans(tl.reshape(also, (CHANNELS, BLOCK_M))), m, n, M, N, x_scales,
                       up_scales, up_top, up_bias, X_SCALE, ROW_SCALE, E8M0, UP_BIAS)  # fmt: skip
        stored(activated(result, ACTIVATION) * also, m, n, M, N, residual, out, RESIDUAL)
    else:
        # Half of the tokens at a time: with all of them an activation's registers would not do.
        result = tl.permute(tl.reshape(result, (BLOCK_N, 2, BLOCK_M // 2)), (0, 2, 1))
        result, also = tl.split(result)
        m = first_m + tl.arange(0, BLOCK_M // 2)
        result = _scaled(tl.trans(result), m, n, M, N, x_scales, w_scales, top, bias, X_SCALE,
                         ROW_SCALE, E8M0, BIAS)  # fmt: skip
        stored(activated(result, ACTIVATION), m, n, M, N, residual, out, RESIDUAL)
        m += BLOCK_M // 2
        also = _scaled(tl.trans(also), m, n, M, N, x_scales, w_scales, top, bias, X_SCALE,
                       ROW_SCALE, E8M0, BIAS)  # fmt: skip
        stored(activated(also, ACTIVATION), m, n, M, N, residual, out, RESIDUAL)


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens, output channels and K of a program; its warps and stages, and
    how many registers a thread may have."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int | None = None


def tile(
    weight: Format,
    operand: torch.dtype,
    tokens: int,
    channels: int,
    tile_columns: int,
    weights: int,
) -> Tile:
    """The cut for a shape class: by tokens, by how wide an operand is, and, so that no processor
    is left without work, by how many programs there will be; `channels` are those of all weights.
    """
    m = min(128, max(16, triton.next_power_of_2(tokens)))
    k = 128 // operand.itemsize
    found = Tile(m, 64, k if m == 64 else 2 * k, 4, 4)
    if m == 128:
        found = Tile(128, 128, k, 8, 3)
        for smaller in (Tile(128, 64, k, 4, 4), Tile(64, 64, k, 4, 4)):
            if triton.cdiv(tokens, found.m) * triton.cdiv(channels, found.n) < _PROGRAMS:
                found = smaller
    if operand.itemsize == 1 and operand != torch.int8:
        # Sums that are kept beside what tensor cores add up take registers of their own.
        found = replace(found, m=min(64, m), n=64, warps=4)
    if weight.bits < 8:
        columns = max(tile_columns, found.k // tile_columns * tile_columns)
        found = replace(found, k=columns, stages=3 if columns * operand.itemsize <= 512 else 2)
        if found.m > 32 and (columns * operand.itemsize > 512 or not has_wgmma()):
            found = replace(found, m=64 if columns <= 128 else 32, n=64, warps=4)
        if columns > 128 and operand.itemsize > 1:
            found = replace(found, m=min(64, found.m), n=64, warps=4, stages=2)
    if weight.has_fp8_products and operand.itemsize == 2 and found.m == found.n == 64:
        found = replace(found, k=2 * k)
    if not has_wgmma() or found.warps != 8:
        return found
    narrow = weight.bits == 4 and weight.scale_dtype == torch.float16
    if narrow and not weight.is_interleaved:
        # Looking codes up takes about as long as multiplying: for twice the tokens, as often.
        if triton.cdiv(tokens, 256) * triton.cdiv(channels, found.n) >= _PROGRAMS:
            found = replace(found, m=256)
    elif narrow or (weight.bits == 8 and weight.group is not None and weights == 1):
        # Two programs on a processor: one unpacks while the other multiplies.
        found = replace(found, registers=128)
    return found


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual.

    Raises UnavailableError for a pair of formats that has no kernel.
    """
    if not dense.product(operand, part, activation, residual):
        _run(operand, part, None, activation, residual)
    return True


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up."""
    if not dense.gated(operand, gate, up, activation):
        _run(operand, gate, up, activation, None)
    return True


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights."""
    if not dense.several(operand, parts):
        for part in parts:
            _run(operand, part, None, "", None)
    return True


def _run(
    given: Operand, part: Part, up: Part | None, activation: str, residual: Tensor | None
) -> None:
    x, scales, kind = given.x, given.scales, given.format
    weight, out = part.weight, part.out
    layout, own = weight.layout, weight.format
    operand = _operand(own, kind, x)
    values = numbers(str(own)) if layout.is_packed else ()
    even = affine(values) if values else None
    element = torch.int32 if layout.is_packed else _element(own)
    codes = weight.codes.view(element)
    tokens = x if x.dtype == torch.float16 else x.view(_element(kind))
    rows, columns = x.shape
    weights = 1 if up is None else 2
    cut = tile(own, operand, rows, weights * layout.rows, layout.tile_columns, weights)
    integer = operand == torch.int8
    e8m0 = own.scale_dtype == torch.uint8
    also = part if up is None else up
    copied = has_wgmma() and columns * tokens.itemsize % 16 == 0
    copied_weight = copied and up is None and not layout.is_packed
    stride = layout.shape[1] * layout.tile_columns
    first: Tensor | TensorDescriptor = codes
    if copied:
        tokens = TensorDescriptor(tokens, [rows, columns], [columns, 1], [cut.m, cut.k])
    if copied_weight:
        first = TensorDescriptor(codes, [layout.rows, columns], [stride, 1], [cut.n, cut.k])
    wide = cut.n if up is None else cut.n // 2
    _matmul[(triton.cdiv(rows, cut.m) * triton.cdiv(layout.rows, wide),)](
        *(tokens, _or(scales, x), first, _or(weight.scales, x), _or(weight.zeros, x)),
        *(_or(part.bias, x), also.weight.codes.view(element), _or(also.weight.scales, x)),
        *(_or(also.weight.zeros, x), _or(also.bias, x), _or(residual, x), out),
        *(rows, layout.rows, columns, stride, layout.shape[1], own.groups(columns)),
        *((weight.top, also.weight.top) if e8m0 else (0, 0)),
        PACKED=layout.is_packed,
        BITS=own.bits,
        PAIRS=layout.pairs if layout.is_packed else 1,
        LANES=layout.lanes,
        INTERLEAVED=layout.interleaved,
        TILE_ROWS=layout.tile_rows,
        NUMBERS=values,
        STRETCH=stretch(str(own)) if values else 1.0,
        STEP=even[0] if even else 0.0,
        OFFSET=even[1] if even else 0.0,
        PTX="" if integer else unpack_ptx(str(own), layout.interleaved),
        GROUP=own.group or 0,
        E8M0=e8m0,
        ZEROS=weight.zeros is not None,
        ROW_SCALE=own.scales_rows,
        X_GROUP=kind.group or 0,
        X_SCALE=scales is not None and kind.group is None,
        OPERAND=_TRITON[operand],
        ACTIVATION=activation,
        BIAS=part.bias is not None,
        UP_BIAS=also.bias is not None,
        GATED=up is not None,
        RESIDUAL=residual is not None,
        EVEN=columns % cut.k == 0,
        COPIED=copied,
        COPIED_WEIGHT=copied_weight,
        IMPRECISE=128 if operand.itemsize == 1 and not integer else None,
        FENCE=not INTERPRETED and has_wgmma() and (layout.is_packed or _element(own) != operand),
        BLOCK_M=cut.m,
        BLOCK_N=cut.n,
        BLOCK_K=cut.k,
        num_warps=cut.warps,
        num_stages=cut.stages,
        maxnreg=cut.registers,
        **overlap(),
    )


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """A pointer has to be something, also where it is not followed."""
    return other if given is None else given


_TRITON = {
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


def _element(kind: Format) -> torch.dtype:
    """Of codes that fill bytes."""
    return torch.float16 if kind.element_type is None else kind.element_type.dtype


def _operand(weight: Format, activation: Format, x: Tensor) -> torch.dtype:
    """In which both operands are multiplied.

    fp8 as float16, which holds it exactly, where x is given so: tensor cores keep 14 bits of the
    sums of fp8 products.
    """
    if activation.is_activation and activation.operand == torch.float16:
        return torch.float16
    if activation.operand == weight.operand and activation.scale_dtype == torch.float32:
        return torch.float16 if x.dtype == torch.float16 else weight.operand
    raise UnavailableError(f"no CUDA kernel multiplies {activation} by {weight} weights")
