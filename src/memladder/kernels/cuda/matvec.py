"""One token's product: every weight is read once, and nothing else counts.

A program has some output channels and all of K, its warps different parts of K. A thread reads 16
bytes of a row at once, and the next ones before it multiplies them; what it unpacks it multiplies
where it is, and the sums meet at the end. The first weights are read before the launch that
computes the activations has finished (`target.wait`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memladder.kernels.cuda import packed_row, whole_row
from memladder.kernels.cuda.part import Operand, Part
from memladder.kernels.cuda.target import overlap


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual; False where there is no such kernel."""
    return _run(operand, [part], False, activation, residual)


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up; False where there is no such kernel."""
    alike = gate.weight.layout == up.weight.layout and gate.weight.format == up.weight.format
    return alike and _run(operand, [gate, up], True, activation, None)


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights in one launch; False where there is no such kernel."""
    kinds = {(part.weight.format, part.weight.columns, part.bias is None) for part in parts}
    tiles = {part.weight.layout.tile_rows for part in parts}
    return len(kinds) == len(tiles) == 1 and _run(operand, parts, False, "", None)


def _run(
    operand: Operand, parts: Sequence[Part], pair: bool, activation: str, residual: Tensor | None
) -> bool:
    if operand.rows != 1 or not 1 <= len(parts) <= 3:
        return False
    if pair and (parts[0].bias is None) != (parts[1].bias is None):
        return False
    kernel = packed_row if parts[0].weight.layout.is_packed else whole_row
    x = operand.x
    options: dict[str, Any] = {
        "PARTS": 1 if pair else len(parts),
        "GATED": pair,
        "ACTIVATION": activation,
        "BIAS": parts[0].bias is not None,
        "RESIDUAL": residual is not None,
        **overlap(),
    }
    given = [x if tensor is None else tensor for tensor in (operand.scales, residual)]
    done: bool = kernel.launch(operand, parts, given, options)
    return done
