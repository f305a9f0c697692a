"""Products with packed weights: out = activation(x · Wᵀ + bias) · factor + residual.

The weight is the product's first operand, its output channels the rows of the tensor core's tile:
so that it can come from registers, unpacked there in the order in which `kernels.layout` laid it
out, and so that a tile may have as few tokens as there are. One row is `matvec`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.errors import UnavailableError
from memladder.formats.base import Format
from memladder.formats.elements import ELEMENTS
from memladder.formats.fp8 import Fp8
from memladder.formats.int8 import Int8
from memladder.formats.mxfp8 import Mxfp8
from memladder.kernels.cuda.decode import affine, numbers, unpack_ptx, unpacked
from memladder.kernels.cuda.epilogue import finished, power
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import has_wgmma

# Fewer programs than an H100 or A100 has processors, about, and tiles become smaller.
_PROGRAMS = 96


@triton.jit
def _matmul(x, x_scales, weight, w_scales, w_zeros, bias, factor, residual, out,
            M, N, K, stride, tiles, groups, top,
            PACKED: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
            INTERLEAVED: tl.constexpr, TILE_ROWS: tl.constexpr, NUMBERS: tl.constexpr,
            STEP: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr,
            GROUP: tl.constexpr, E8M0: tl.constexpr, ZEROS: tl.constexpr, ROW_SCALE: tl.constexpr,
            X_GROUP: tl.constexpr, X_SCALE: tl.constexpr, OPERAND: tl.constexpr,
            ACTIVATION: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
            RESIDUAL: tl.constexpr, EVEN: tl.constexpr, COPIED: tl.constexpr,
            IMPRECISE: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # Programs that share a weight follow each other: it is read from memory once.
    blocks = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % blocks) * BLOCK_M
    first_n = (tl.program_id(0) // blocks) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    # Rows beyond the end repeat the first one; what they give is not stored.
    own_m = tl.where(m < M, m, 0)
    own_n = tl.where(n < N, n, 0)
    k = tl.arange(0, BLOCK_K)
    x_at = own_m[:, None].to(tl.int64) * K + k[None, :]
    if PACKED:
        # Words: a row of a tile has 16.
        TILES: tl.constexpr = BLOCK_K // (16 * PAIRS * LANES)
        word = tl.arange(0, TILES * 16)
        w_row = (own_n // TILE_ROWS).to(tl.int64) * tiles * (TILE_ROWS * 16)
        w_row += (own_n % TILE_ROWS) * 16
        w_at = w_row[:, None] + ((word // 16) * (TILE_ROWS * 16) + word % 16)[None, :]
    else:
        w_at = own_n[:, None].to(tl.int64) * stride + k[None, :]
    INTEGER: tl.constexpr = OPERAND == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        if COPIED:
            tokens = x.load([first_m, start])
        elif EVEN:
            tokens = tl.load(x + x_at)
        else:
            tokens = tl.load(x + x_at, mask=(start + k < K)[None, :], other=0.0)
        if PACKED:
            if EVEN or TILES == 1:
                words = tl.load(weight + w_at)
            else:
                left = tiles - start // (16 * PAIRS * LANES)
                words = tl.load(weight + w_at, mask=(word // 16 < left)[None, :], other=0)
            values = unpacked(words, BLOCK_N, TILES, BITS, PAIRS, LANES, INTERLEAVED,
                              NUMBERS, STEP, OFFSET, PTX, INTEGER)  # fmt: skip
            w_at += TILES * TILE_ROWS * 16
        else:
            if COPIED:
                values = weight.load([first_n, start])
            elif EVEN:
                values = tl.load(weight + w_at)
            else:
                values = tl.load(weight + w_at, mask=(start + k < K)[None, :], other=0.0)
            w_at += BLOCK_K
            values = values.to(OPERAND)
        if GROUP > 0:
            SHARE: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
            group = start // GROUP + tl.arange(0, BLOCK_K // SHARE)
            s_at = tl.minimum(group, groups - 1)[None, :] * N + own_n[:, None]
            scale = tl.load(w_scales + s_at)
            scale = power(scale, top).to(OPERAND) if E8M0 else scale.to(OPERAND)
            values = tl.reshape(values, (BLOCK_N, BLOCK_K // SHARE, SHARE))
            if ZEROS:
                values -= tl.load(w_zeros + s_at).to(OPERAND)[:, :, None]
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
        x_at += BLOCK_K
    result = tl.trans(acc).to(tl.float32)
    if ROW_SCALE:
        result *= tl.load(w_scales + own_n).to(tl.float32)[None, :]
    if E8M0:
        result *= power(top, 127)
    if X_SCALE:
        result *= tl.load(x_scales + own_m).to(tl.float32)[:, None]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    finished(result, at, own_n[None, :], inside, bias, factor, residual, out,
             ACTIVATION, BIAS, FACTOR, RESIDUAL)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens, output channels and K of a program; its warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile(
    weight: Format, operand: torch.dtype, tokens: int, channels: int, tile_columns: int
) -> Tile:
    """The cut for a shape class: by tokens, by how wide an operand is, and, so that no processor
    is left without work, by how many programs there will be."""
    m = min(128, max(16, triton.next_power_of_2(tokens)))
    k = 128 // operand.itemsize
    found = Tile(m, 64, k if m == 64 else 2 * k, 4, 4)
    if m == 128:
        found = Tile(128, 128, k, 8, 3)
        for smaller in (Tile(128, 64, k, 4, 4), Tile(64, 64, k, 4, 4)):
            if triton.cdiv(tokens, found.m) * triton.cdiv(channels, found.n) < _PROGRAMS:
                found = smaller
    if weight.bits < 8:
        columns = max(tile_columns, found.k // tile_columns * tile_columns)
        found = replace(found, k=columns, stages=3 if columns <= 128 else 2)
        if found.m > 32 and not has_wgmma():
            found = replace(found, m=64 if columns <= 128 else 32, n=64, warps=4)
    return found


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual.

    Raises UnavailableError for a pair of formats that has no kernel.
    """
    _run(operand, part, activation, None, residual)
    return True


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up."""
    _run(operand, up, "", None, None)
    _run(operand, gate, activation, gate.out, None)
    return True


def _run(
    given: Operand, part: Part, activation: str, factor: Tensor | None, residual: Tensor | None
) -> None:
    x, scales, kind = given.x, given.scales, given.format
    weight, out, bias = part.weight, part.out, part.bias
    epilogue = (bias, factor, residual)
    layout, own = weight.layout, weight.format
    operand = _operand(own, kind)
    values = numbers(str(own)) if layout.is_packed else ()
    even = affine(values) if values else None
    codes = weight.codes.view(torch.int32 if layout.is_packed else _element(own))
    tokens = x.view(_element(kind))
    rows, columns = x.shape
    cut = tile(own, operand, rows, layout.rows, layout.tile_columns)
    integer = operand == torch.int8
    e8m0 = own.scale_dtype == torch.uint8
    scale = weight.scales if weight.scales is not None else x
    grid = triton.cdiv(rows, cut.m) * triton.cdiv(layout.rows, cut.n)
    copied = has_wgmma() and columns * tokens.itemsize % 16 == 0
    if copied:
        tokens = TensorDescriptor(tokens, [rows, columns], [columns, 1], [cut.m, cut.k])
        if not layout.is_packed:
            stride = layout.shape[1] * layout.tile_columns
            codes = TensorDescriptor(codes, [layout.rows, columns], [stride, 1], [cut.n, cut.k])
    _matmul[(grid,)](
        *(tokens, x if scales is None else scales, codes, scale),
        weight.zeros if weight.zeros is not None else x,
        *(x if part is None else part for part in epilogue),
        *(out, rows, layout.rows, columns),
        layout.shape[1] * layout.tile_columns,
        layout.shape[1],
        own.groups(columns),
        weight.top if e8m0 else 0,
        PACKED=layout.is_packed,
        BITS=own.bits,
        PAIRS=layout.pairs if layout.is_packed else 1,
        LANES=layout.lanes,
        INTERLEAVED=layout.interleaved,
        TILE_ROWS=layout.tile_rows,
        NUMBERS=values,
        STEP=even[0] if even else 0.0,
        OFFSET=even[1] if even else 0.0,
        PTX="" if integer else unpack_ptx(str(own), layout.interleaved),
        GROUP=own.group or 0,
        E8M0=e8m0,
        ZEROS=weight.zeros is not None,
        ROW_SCALE=own.scale_dtype is not None and own.group is None,
        X_GROUP=kind.group or 0,
        X_SCALE=scales is not None and kind.group is None,
        OPERAND=_TRITON[operand],
        ACTIVATION=activation,
        BIAS=bias is not None,
        FACTOR=factor is not None,
        RESIDUAL=residual is not None,
        EVEN=columns % cut.k == 0,
        COPIED=copied,
        IMPRECISE=128 if operand.itemsize == 1 and not integer else None,
        BLOCK_M=cut.m,
        BLOCK_N=cut.n,
        BLOCK_K=cut.k,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


_TRITON = {
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


def _element(kind: Format) -> torch.dtype:
    """Of codes that fill bytes."""
    if isinstance(kind, (Fp8, Mxfp8)):
        return ELEMENTS[kind.element].dtype
    return torch.int8 if isinstance(kind, Int8) else torch.float16


def _operand(weight: Format, activation: Format) -> torch.dtype:
    """In which both operands are multiplied."""
    if activation.bits == 16 or isinstance(activation, Mxfp8):
        return torch.float16
    if activation.is_integer and weight.is_integer:
        return torch.int8
    if isinstance(weight, Fp8) and activation == replace(weight, scale="float32"):
        return ELEMENTS[weight.element].dtype
    raise UnavailableError(f"no CUDA kernel multiplies {activation} by {weight} weights")
