"""float16 as it is: 16 bits, no scale.

Source: IEEE 754-2019, binary16. A weight that only a wider type can hold is refused, not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.core.errors import FormatError
from memladder.formats._shared.base import Format, Quantised


@dataclass(frozen=True)
class Fp16(Format):
    """Codes are the bit patterns, int16."""

    bits = 16
    source = "IEEE 754-2019, binary16"
    is_activation = True
    is_row = False  # `ladder` alone

    def quantise(self, values: Tensor) -> Quantised:
        """Round to nearest even. Raises FormatError for a finite value beyond 65504."""
        codes = values.to(torch.float16)
        if values.dtype != torch.float16 and torch.isinf(codes).any():
            raise FormatError("a value beyond 65504 does not fit into fp16")
        return Quantised(codes.contiguous().view(torch.int16))

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers themselves."""
        return codes.view(torch.float16).float()


FORMAT = Fp16
