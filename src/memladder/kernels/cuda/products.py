"""Products with packed weights: which kernel multiplies how many rows.

A module of kernels says itself whether it has one for a pair of formats and a number of rows:
`matvec` for one, `skinny` for few, where reading the weights is all that counts, `matmul` for any.
"""

from __future__ import annotations

from torch import Tensor

from memladder import formats
from memladder.kernels.cuda import matmul as many
from memladder.kernels.cuda import matvec, skinny
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.rows import rotary
from memladder.kernels.cuda.target import has_wgmma
from memladder.kernels.packed import PackedMatrix


def workspace_bytes(rows: int) -> int:
    """What products of so many rows want of the workspace."""
    return skinny.WORKSPACE_BYTES if skinny.MOST_ROWS >= rows > 1 and has_wgmma() else 0


def use_workspace(memory: Tensor) -> None:
    """Use this memory in the next products: uint8, zero at first, none where it is empty."""
    skinny.set_workspace(memory if memory.numel() else None)


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
    """As `naive.matmul`. Raises UnavailableError for a pair of formats that has no kernel."""
    operand = Operand(x, scales, formats.get(format))
    part = Part(weight, out, bias)
    for module in (matvec, skinny, many):
        if module.product(operand, part, activation, residual):
            return


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
    """As `naive.glu`."""
    operand = Operand(x, scales, formats.get(format))
    parts = Part(gate, out, gate_bias), Part(up, out, up_bias)
    for module in (matvec, skinny, many):
        if module.gated(operand, *parts, activation):
            return


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
    """As `naive.qkv`."""
    operand = Operand(x, scales, formats.get(format))
    parts = [
        Part(weight, out, bias)
        for weight, out, bias in (
            (query_weight, query, query_bias),
            (key_weight, key, key_bias),
            (value_weight, value, value_bias),
        )
        if weight is not None and out is not None
    ]
    for module in (matvec, skinny, many):
        if module.several(operand, parts):
            break
    if frequencies is not None:
        for out in (query, key):
            if out is not None:
                rotary(out, frequencies, out, head_dim=head_dim, start=start, seq_len=seq_len)
