"""What a product is made of, as the modules of kernels hand it to each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memladder.formats._shared.base import Format
from memladder.kernels.packed import PackedMatrix


@dataclass(frozen=True)
class Operand:
    """Activations x [rows, K]: float16, or codes of `format` with their `scales`."""

    x: Tensor
    scales: Tensor | None
    format: Format

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.x.shape[0]


@dataclass(frozen=True)
class Part:
    """One weight [N, K], where its product goes, float16 [rows, N], and its bias [N]."""

    weight: PackedMatrix
    out: Tensor
    bias: Tensor | None
