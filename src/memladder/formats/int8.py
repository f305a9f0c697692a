"""int8 with one float32 scale a row: an activation's per-token absmax quantisation.

Source: Wang et al. 2023, "BitNet" (arXiv:2310.11453), section 2.2: x · 127 / absmax, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared.base import Format, Quantised, absmax, divided
from memladder.formats._shared.elements import INT8, Element


@dataclass(frozen=True)
class Int8(Format):
    """Codes are two's complement, −127 to 127."""

    bits = 8
    scale_dtype = torch.float32
    source = "arXiv:2310.11453, section 2.2"
    is_activation = True
    is_integer = True
    operand = torch.int8
    is_row = False  # an activation's format

    @property
    def element_type(self) -> Element:
        """Whole numbers."""
        return INT8

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest, ties to even. A row of zeros has scale 1."""
        values = values.float()
        most = absmax(values)
        scales = torch.where(most == 0, 1.0, divided(most, 127.0))
        return Quantised(INT8.encode(values / scales), scales)

    def decode(self, codes: Tensor) -> Tensor:
        """−127 to 127."""
        return self.integers(codes).float()

    def integers(self, codes: Tensor) -> Tensor:
        """−127 to 127."""
        return codes.view(torch.int8)


FORMAT = Int8
