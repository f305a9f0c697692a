"""Products with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memladder import formats
from memladder.formats._shared.base import Format, Quantised
from memladder.kernels.naive.blocks import ROWS, TILE, blocks
from memladder.kernels.naive.rows import activated, rotary
from memladder.kernels.packed import PackedMatrix

_WEIGHT_ROWS = 512
_WEIGHT_COLUMNS = 2048


def matmul(
    x: Tensor,
    weight: PackedMatrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    activation: str = "",
    residual: Tensor | None = None,
) -> None:
    """out = activation(x · Wᵀ + bias) + residual.

    x [rows, K]: float16, or with `scales` what `quantise` made of it in `format`. weight [N, K].
    bias [N]; residual, out float16 [rows, N], may be the same. Where both operands are integers
    (`Format.is_integer`) products are summed exactly.
    """
    for m, n in _output_blocks(x, weight):
        sums = activated(_product(x, weight, m, n, bias, scales, format), activation)
        if residual is not None:
            sums += residual[m, n].float()
        out[m, n] = sums


def glu(
    x: Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    out: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    activation: str = "silu",
) -> None:
    """out = activation(x · Gᵀ + gate_bias) · (x · Uᵀ + up_bias): Shazeer 2020 (arXiv:2002.05202).

    gate, up [N, K]; all else as in `matmul`.
    """
    for m, n in _output_blocks(x, gate):
        sums = activated(_product(x, gate, m, n, gate_bias, scales, format), activation)
        out[m, n] = sums.mul_(_product(x, up, m, n, up_bias, scales, format))


def qkv(
    x: Tensor,
    *,
    query_weight: PackedMatrix | None = None,
    key_weight: PackedMatrix | None = None,
    value_weight: PackedMatrix | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    frequencies: Tensor | None = None,
    head_dim: int = 0,
    start: int = 0,
    seq_len: int = 1,
) -> None:
    """Attention's three products of x, or those of them whose weights are given.

    With `frequencies` queries and keys are rotated as by `rotary`, after they were rounded to
    float16. All else as in `matmul`.
    """
    for weight, out, bias in (
        (query_weight, query, query_bias),
        (key_weight, key, key_bias),
        (value_weight, value, value_bias),
    ):
        if weight is None or out is None:
            continue
        matmul(x, weight, out, bias=bias, scales=scales, format=format)
        if frequencies is not None and out is not value:
            rotary(out, frequencies, out, head_dim=head_dim, start=start, seq_len=seq_len)


def workspace_bytes(rows: int) -> int:
    """These kernels need none."""
    del rows
    return 0


def use_workspace(memory: Tensor) -> None:
    """Nothing is done with it."""
    del memory


def _output_blocks(x: Tensor, weight: PackedMatrix) -> Iterator[tuple[slice, slice]]:
    for m in blocks(x.shape[0], ROWS):
        for n in blocks(weight.rows, TILE // ROWS):
            yield m, n


def _product(
    x: Tensor,
    weight: PackedMatrix,
    m: slice,
    n: slice,
    bias: Tensor | None,
    scales: Tensor | None,
    format: str,
) -> Tensor:
    """Rows m and columns n of x · Wᵀ + bias, float32."""
    kind = formats.get(format)
    if scales is not None and kind.is_integer and weight.format.is_integer:
        sums = _integer_sums(kind.integers(x[m]), weight, n)
        sums *= scales[m].float()
    else:
        sums = torch.zeros(m.stop - m.start, n.stop - n.start, device=x.device)
        for c in blocks(weight.columns, _WEIGHT_COLUMNS):
            operand = _operand(x[m, c], None if scales is None else scales[m], c, kind)
            for w in _weight_blocks(n):
                part = sums[:, w.start - n.start : w.stop - n.start]
                part.addmm_(operand, _weights(weight, w, c).t())
    if bias is not None:
        sums += bias[n].float()
    return sums


def _integer_sums(x: Tensor, weight: PackedMatrix, n: slice) -> Tensor:
    """Exact sums of products, times the weight's scales: float32 [rows, n]."""
    assert weight.scales is not None
    # Below 2²⁴ as long as K is below 132,104: float32 holds them exactly, in whatever order.
    sums = torch.zeros(x.shape[0], n.stop - n.start, device=x.device)
    for c in blocks(weight.columns, _WEIGHT_COLUMNS):
        operand = x[:, c].float()
        for w in _weight_blocks(n):
            codes = weight.format.integers(_tiles(weight, w, c).codes)
            sums[:, w.start - n.start : w.stop - n.start].addmm_(operand, codes.float().t())
    return sums.mul_(weight.format.scale_values(weight.scales[0, n]))


def _operand(x: Tensor, scales: Tensor | None, c: slice, kind: Format) -> Tensor:
    """Columns c of an activation as float32, from float16 or from codes with their rows' scales."""
    if scales is None:
        return x.float()
    if x.dtype == torch.float16:
        return x.float() * scales
    if kind.group is not None:
        scales = scales[:, c.start // kind.group : -(-c.stop // kind.group)]
    return kind.dequantise(Quantised(x, scales))


def _weights(weight: PackedMatrix, rows: slice, columns: slice) -> Tensor:
    return weight.format.dequantise(_tiles(weight, rows, columns))


def _tiles(weight: PackedMatrix, rows: slice, columns: slice) -> Quantised:
    """Rows and columns that begin with a tile, and end with one or with the matrix."""
    layout = weight.layout
    row, column = rows.start // layout.tile_rows, columns.start // layout.tile_columns
    row_tiles = -(-rows.stop // layout.tile_rows) - row
    return weight.tiles(row, row_tiles, column, -(-columns.stop // layout.tile_columns) - column)


def _weight_blocks(n: slice) -> Iterator[slice]:
    for start in range(n.start, n.stop, _WEIGHT_ROWS):
        yield slice(start, min(start + _WEIGHT_ROWS, n.stop))
