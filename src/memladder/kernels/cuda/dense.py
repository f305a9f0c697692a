"""Products of many rows where both operands are multiplied as they are stored: float16 and fp8.

Copy engines bring tiles of both into shared memory, from which the tensor cores of compute
capability 9.0 read them. Two weights of one shape are read as one tensor [2, N, K], whose first
stride is how far apart they lie: a tile then has the gate's channels beside the other's, for one
wide product, or a launch has the keys' tiles after the values'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.kernels.cuda.epilogue import activated, stored
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import has_wgmma, overlap, wait
from memladder.kernels.cuda.tuning import choice

# Fewer rows are `skinny`'s.
_ROWS = 64
# How far along K tensor cores add up fp8 products before what they have is kept more precisely.
_CARRY = 1024
# Fewer programs than an H100 has processors, about, and tiles become smaller.
_PROGRAMS = 96


@triton.jit
def _scaled(x, m, n, M, N, x_scales, scales, bias, SCALED: tl.constexpr, BIAS: tl.constexpr):
    own = tl.minimum(n, N - 1)
    if SCALED:
        x *= tl.load(scales + own).to(tl.float32)[None, :]
        x *= tl.load(x_scales + tl.minimum(m, M - 1)).to(tl.float32)[:, None]
    if BIAS:
        x += tl.load(bias + own).to(tl.float32)[None, :]
    return x


@triton.jit
def _carried(acc, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """Sums [ROWS, COLUMNS] in two parts, and the same in two parts again: what the sums' upper
    halves, two in a word, hold, and what they leave. With LAST the whole sums instead.

    Tensor cores keep 14 bits of a sum of fp8 products (DeepSeek-AI 2024, arXiv:2412.19437, section
    3.3.2): they lose less where they add to what is left. Adding up in float32 beside them would
    take as many registers again; this takes half.
    """
    low, high = tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))
    low += (kept << 16).to(tl.float32, bitcast=True)
    # The other's bits stay below: they are taken away again as they were added.
    high += kept.to(tl.float32, bitcast=True)
    if not LAST:
        bits = low.to(tl.int32, bitcast=True)
        kept = (high.to(tl.int32, bitcast=True) & -0x10000) | ((bits >> 16) & 0xFFFF)
        low -= (bits & -0x10000).to(tl.float32, bitcast=True)
        high -= kept.to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS)), kept


@triton.jit
def _dense(x, weights, x_scales, scales, also_scales, bias, also_bias, residual, out, also_out,
           M, N, K, FIRST: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
           ALSO_BIAS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
           RESIDUAL: tl.constexpr, EVERY: tl.constexpr, PDL: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # Programs that share a weight follow each other: it is read from memory once.
    HALF: tl.constexpr = BLOCK_N // 2
    CHANNELS: tl.constexpr = HALF if GATED else BLOCK_N
    blocks = tl.cdiv(M, BLOCK_M)
    first_m = tl.program_id(0) % blocks * BLOCK_M
    first_n = tl.program_id(0) // blocks * CHANNELS
    m = first_m + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    if part == 1:
        scales, bias, out = also_scales, also_bias, also_out
    part = part ^ FIRST
    wait(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    kept = tl.zeros((BLOCK_M, HALF), tl.int32)
    for k in range(0, K, BLOCK_K):
        tokens = x.load([first_m, k])
        values = weights.load([0 if GATED else part, first_n, k])
        acc = tl.dot(tokens, tl.reshape(values, (BLOCK_N, BLOCK_K)).T, acc)
        if EVERY > 0 and k // BLOCK_K % EVERY == EVERY - 1:
            acc, kept = _carried(acc, kept, BLOCK_M, BLOCK_N, False)
    if EVERY > 0:
        acc, kept = _carried(acc, kept, BLOCK_M, BLOCK_N, True)
    # Half of the channels at a time: with all of them an activation's registers would not do.
    acc, also = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    n = first_n + tl.arange(0, HALF)
    if GATED:
        if FIRST == 1:
            acc, also = also, acc
        acc = _scaled(acc, m, n, M, N, x_scales, scales, bias, SCALED, BIAS)
        also = _scaled(also, m, n, M, N, x_scales, also_scales, also_bias, SCALED, ALSO_BIAS)
        stored(activated(acc, ACTIVATION) * also, m, n, M, N, residual, out, RESIDUAL)
    else:
        acc = _scaled(acc, m, n, M, N, x_scales, scales, bias, SCALED, BIAS)
        stored(activated(acc, ACTIVATION), m, n, M, N, residual, out, RESIDUAL)
        n += HALF
        also = _scaled(also, m, n, M, N, x_scales, scales, bias, SCALED, BIAS)
        stored(activated(also, ACTIVATION), m, n, M, N, residual, out, RESIDUAL)


@dataclass(frozen=True)
class DenseCut:
    """A program's tokens, output channels (of both weights together where gated) and step along K;
    warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


_CUTS = {
    "fp16": (DenseCut(128, 256, 64, 8, 4), DenseCut(128, 256, 64, 8, 3)),
    "fp16 narrow": (DenseCut(64, 128, 128, 4, 3), DenseCut(64, 128, 64, 4, 4)),
    "fp8": (DenseCut(128, 256, 128, 8, 4), DenseCut(128, 256, 128, 8, 3)),
    "fp8 narrow": (DenseCut(64, 128, 256, 4, 3), DenseCut(64, 128, 128, 4, 4)),
}


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual; False where there is no such kernel."""
    if not _fits(operand, part):
        return False
    _launch(operand, part, None, activation, residual, gated=False)
    return True


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up; False where there is no such kernel."""
    if not (_fits(operand, gate) and _stacked(gate, up)):
        return False
    _launch(operand, gate, up, activation, None, gated=True)
    return True


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights; False where there is no such kernel. Two of one shape that
    follow each other are one launch."""
    if not all(_fits(operand, part) for part in parts):
        return False
    left = list(parts)
    while left:
        part = left.pop(0)
        also = left.pop(0) if left and _stacked(part, left[0]) else None
        _launch(operand, part, also, "", None, gated=False)
    return True


def _fits(operand: Operand, part: Part) -> bool:
    own, kind = part.weight.format, operand.format
    # Both as they are: fp16, or fp8 of one element.
    same = own.operand == kind.operand and own.bits == kind.bits == 8 * own.operand.itemsize
    # What copy engines ask of a stride; and stored rows are no longer than they need be.
    same = same and own.operand.is_floating_point and operand.x.itemsize == own.bits // 8
    aligned = part.weight.columns % (128 // own.bits) == 0
    return same and aligned and operand.rows > _ROWS and has_wgmma()


def _stacked(one: Part, other: Part) -> bool:
    """Whether two weights can be read as one tensor."""
    apart = one.weight.codes.data_ptr() - other.weight.codes.data_ptr()
    return one.weight.layout == other.weight.layout and apart % 16 == 0


def _launch(
    operand: Operand,
    part: Part,
    also: Part | None,
    activation: str,
    residual: Tensor | None,
    *,
    gated: bool,
) -> None:
    weight = part.weight
    dtype = weight.format.operand
    x = operand.x.view(dtype)
    rows, columns = x.shape
    channels = weight.rows * (1 if also is None else 2)
    fp8 = dtype.itemsize == 1
    name = "fp8" if fp8 else "fp16"
    widest = _CUTS[name][0]
    if triton.cdiv(rows, widest.m) * triton.cdiv(channels, widest.n) < _PROGRAMS:
        name += " narrow"
    cut = choice("dense", name, _CUTS[name])
    stacked = [weight.codes.view(dtype)]
    if also is not None:
        stacked.append(also.weight.codes.view(dtype))
    base = min(stacked, key=Tensor.data_ptr)
    apart = abs(stacked[0].data_ptr() - stacked[-1].data_ptr()) // dtype.itemsize
    box = [2, cut.n // 2, cut.k] if gated else [1, cut.n, cut.k]
    weights = TensorDescriptor(
        base,
        [len(stacked), weight.rows, columns],
        [apart or weight.rows * columns, columns, 1],
        box,
    )
    other = part if also is None else also
    wide = cut.n // 2 if gated else cut.n
    grid = triton.cdiv(rows, cut.m) * triton.cdiv(weight.rows, wide)
    scales = (operand.scales, weight.scales, other.weight.scales)
    pointers = (*scales, part.bias, other.bias, residual)
    _dense[(grid, 1 if gated else len(stacked))](
        TensorDescriptor(x, [rows, columns], [columns, 1], [cut.m, cut.k]),
        weights,
        # A pointer has to be something, also where it is not followed.
        *(x if pointer is None else pointer for pointer in pointers),
        *(part.out, other.out, rows, weight.rows, columns),
        FIRST=int(base is not stacked[0]),
        SCALED=fp8,
        BIAS=part.bias is not None,
        ALSO_BIAS=other.bias is not None,
        GATED=gated,
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        EVERY=_CARRY // cut.k if fp8 else 0,
        BLOCK_M=cut.m,
        BLOCK_N=cut.n,
        BLOCK_K=cut.k,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlap(),
    )
