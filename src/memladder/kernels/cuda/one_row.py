"""One row's products: what the kernels of packed and of whole rows share.

A launch makes the products of up to three weights; a program some output channels of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.epilogue import activated, finished
from memladder.kernels.cuda.part import Part


@triton.jit
def part_of(ROWS: tl.constexpr, PARTS: tl.constexpr, first, second, third):
    """Of several products (weight, scales, bias, out, channels) a program's, and which of its
    blocks of channels."""
    pid = tl.program_id(0)
    weight, scales, bias, out, N = first
    if PARTS > 1:
        blocks = tl.cdiv(N, ROWS)
        if pid >= blocks:
            pid -= blocks
            weight, scales, bias, out, N = second
            if PARTS > 2:
                blocks = tl.cdiv(N, ROWS)
                if pid >= blocks:
                    pid -= blocks
                    weight, scales, bias, out, N = third
    return pid, weight, scales, bias, out, N


@triton.jit
def channels(pid, row, N, ROWS: tl.constexpr):
    """Of a program's rows: their channels, the same with those beyond the end replaced, and
    whether they are of the second of two weights, which then follow those of the first."""
    n = pid * ROWS + row % ROWS
    return n, tl.where(n < N, n, 0), row >= ROWS


@triton.jit
def finish(result, n, own, N, bias, bias2, residual, out, ROWS: tl.constexpr,
            GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
            RESIDUAL: tl.constexpr):  # fmt: skip
    """Store a program's sums; gated, activation(first half) · second half."""
    if GATED:
        FIRST: tl.constexpr = result.shape[0]
        SHAPE: tl.constexpr = (FIRST, 2, ROWS // FIRST)
        gate, up = tl.split(tl.permute(tl.reshape(result, SHAPE), (0, 2, 1)))
        n, _ = tl.split(tl.permute(tl.reshape(n, SHAPE), (0, 2, 1)))
        own, _ = tl.split(tl.permute(tl.reshape(own, SHAPE), (0, 2, 1)))
        if BIAS:
            gate += tl.load(bias + own).to(tl.float32)
            up += tl.load(bias2 + own).to(tl.float32)
        tl.store(out + n, (activated(gate, ACTIVATION) * up).to(tl.float16), mask=n < N)
    else:
        finished(result, n, own, n < N, bias, residual, out,
                 ACTIVATION, BIAS, RESIDUAL)  # fmt: skip


@dataclass(frozen=True)
class RowCut:
    """Output channels of a program (of each of two weights, if gated), its warps, and, of whole
    rows, how much of K a step has; of packed ones, whether tensor cores multiply."""

    rows: int
    warps: int
    block: int = 0
    cores: bool = False


def matrices(parts: Sequence[Part], x: Tensor, element: torch.dtype) -> list[Any]:
    """Three times weight, scales, bias, out and channels; the last again where there are fewer."""
    found: list[Any] = []
    for number in range(3):
        part = parts[min(number, len(parts) - 1)]
        scales = x if part.weight.scales is None else part.weight.scales
        bias = x if part.bias is None else part.bias
        found += [part.weight.codes.view(element), scales, bias, part.out, part.weight.rows]
    return found


def shape_class(parts: Sequence[Part], pair: bool) -> str:
    """The class of shapes that a cut is chosen for."""
    weight = parts[0].weight
    rows = sum(part.weight.rows for part in parts)
    return f"{weight.format} {'gated ' * pair}{rows}x{weight.columns}"
