"""Products of few rows (2 to 64): reading the weights is what takes the time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memladder.kernels.cuda.part import Operand, Part


def product(operand: Operand, part: Part, activation: str, residual: Tensor | None) -> bool:
    """out = activation(x · Wᵀ + bias) + residual; False where there is no such kernel."""
    return False


def gated(operand: Operand, gate: Part, up: Part, activation: str) -> bool:
    """out = activation(gate) · up; False where there is no such kernel."""
    return False


def several(operand: Operand, parts: Sequence[Part]) -> bool:
    """The products of several weights in one launch; False where there is no such kernel."""
    return False
