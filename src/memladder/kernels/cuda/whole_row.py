"""One row times weights whose rows are whole: 8 and 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.epilogue import power
from memladder.kernels.cuda.one_row import RowCut, channels, finish, matrices, part_of, shape_class
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import wait
from memladder.kernels.cuda.tuning import choice


@triton.jit
def _whole(x, x_scales, residual, weight0, scales0, bias0, out0, N0, weight1, scales1, bias1, out1,
           N1, weight2, scales2, bias2, out2, N2, K, stride,
           PARTS: tl.constexpr, GATED: tl.constexpr, BYTES: tl.constexpr,
           GROUP: tl.constexpr, ROW_SCALE: tl.constexpr,
           X_SCALE: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, PDL: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    pid, weight, w_scales, bias, out, N = part_of(
        ROWS, PARTS, (weight0, scales0, bias0, out0, N0),
        (weight1, scales1, bias1, out1, N1), (weight2, scales2, bias2, out2, N2))  # fmt: skip
    ALL: tl.constexpr = (2 if GATED else 1) * ROWS
    n, own, second = channels(pid, tl.arange(0, ALL), N, ROWS)
    row, scale_at = own.to(tl.int64) * stride, own.to(tl.int64)
    if GATED:
        row = tl.where(second, weight1, weight0) + row
        scale_at = tl.where(second, scales1, scales0) + scale_at
    else:
        row, scale_at = weight + row, w_scales + scale_at
    k = tl.arange(0, BLOCK)
    at = row[:, None] + k[None, :]
    values = tl.load(at, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    wait(PDL)
    # What a thread reads at once; it has one scale.
    CHUNK: tl.constexpr = 16 // BYTES
    acc = tl.zeros((ALL, BLOCK // CHUNK), tl.float32)
    for begin in range(0, K, 2 * BLOCK):
        for step in tl.static_range(2):
            start = begin + step * BLOCK
            at += BLOCK
            following = tl.load(at, mask=(start + BLOCK + k < K)[None, :], other=0.0,
                                eviction_policy="evict_first")  # fmt: skip
            tokens = tl.load(x + start + k, mask=start + k < K, other=0.0)
            # By way of float16: there is an instruction for that.
            numbers = values.to(tl.float16).to(tl.float32)
            products = numbers * tokens.to(tl.float16).to(tl.float32)[None, :]
            sums = tl.sum(tl.reshape(products, (ALL, BLOCK // CHUNK, CHUNK)), axis=2)
            if GROUP > 0:
                group = (start + tl.arange(0, BLOCK // CHUNK) * CHUNK) // GROUP
                group = tl.minimum(group, tl.cdiv(K, GROUP) - 1)
                w_scale = tl.load(scale_at[:, None] + (group * N)[None, :])
                x_scale = power(tl.load(x_scales + group), 127)
                sums *= power(w_scale, 127) * x_scale[None, :]
            acc += sums
            values = following
    result = tl.sum(acc, axis=1)
    if ROW_SCALE:
        result *= tl.load(scale_at).to(tl.float32)
    if X_SCALE:
        result *= tl.load(x_scales)
    finish(result[None, :], n[None, :], own[None, :], N, bias, bias1, residual, out,
            ROWS, GATED, ACTIVATION, BIAS, RESIDUAL)  # fmt: skip


def launch(
    operand: Operand, parts: Sequence[Part], given: Sequence[Tensor], options: dict[str, Any]
) -> bool:
    weight, kind = parts[0].weight, operand.format
    layout, own = weight.layout, weight.format
    numbers = [one.element_type for one in (own, kind)]
    dtypes = [one.dtype for one in numbers if one is not None and one.is_float]
    if own.bits == 16 and kind.bits == 16:
        element, token = torch.float16, torch.float16
    elif len(dtypes) == 2 and own.group == kind.group:
        element, token = dtypes
    else:
        return False
    token = torch.float16 if operand.x.dtype == torch.float16 else token
    pair = options["GATED"]
    cut = choice("matvec", shape_class(parts, pair), _cuts(parts, pair))
    grid = sum(triton.cdiv(part.weight.rows, cut.rows) for part in parts)
    _whole[(grid if options["PARTS"] > 1 else triton.cdiv(layout.rows, cut.rows),)](
        *(operand.x.view(token), *given),
        *matrices(parts, operand.x, element),
        *(layout.columns, layout.shape[1] * layout.tile_columns),
        **options,
        BYTES=element.itemsize,
        GROUP=own.group or 0,
        ROW_SCALE=own.scales_rows,
        X_SCALE=own.scales_rows,
        ROWS=cut.rows,
        BLOCK=cut.block,
        num_warps=cut.warps,
    )
    return True


def _cuts(parts: Sequence[Part], pair: bool) -> Sequence[RowCut]:
    own = parts[0].weight.format
    if own.bits == 16:
        return (
            [RowCut(2, 8, 2048), RowCut(2, 4, 1024)]
            if pair
            else [RowCut(4, 8, 2048), RowCut(4, 4, 1024)]
        )
    if pair:
        return [RowCut(2, 2, 1024), RowCut(2, 4, 2048)] if own.group else [RowCut(1, 4, 2048)]
    return [RowCut(2, 4, 2048), RowCut(4, 4, 2048)]
