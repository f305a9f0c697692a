"""The 8-bit numbers of deep learning: E4M3 and E5M2, and whole numbers, saturating.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv:2209.05433), table 1; the
same elements in OCP OFP8 v1.0. A value beyond the largest finite one becomes that one; NaN stays
NaN. E4M3 has no infinity; E5M2's is never made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """`top` is the largest finite value, `exponent` that of the largest power of two below it."""

    dtype: torch.dtype
    top: float
    exponent: int

    @property
    def is_float(self) -> bool:
        """Whether its steps grow with the number."""
        return self.dtype.is_floating_point

    @property
    def mantissa(self) -> int:
        """Bits of it; 0 for whole numbers."""
        return -int(math.log2(torch.finfo(self.dtype).eps)) if self.is_float else 0

    @property
    def step(self) -> float:
        """The least difference of two of them."""
        if not self.is_float:
            return 1.0
        info = torch.finfo(self.dtype)
        return info.tiny * info.eps

    def encode(self, values: Tensor) -> Tensor:
        """float32 to codes, uint8: nearest, ties to even, saturating."""
        if not self.is_float:
            values = values.round()
        return values.clamp(-self.top, self.top).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to float32."""
        return codes.view(self.dtype).float()


ELEMENTS = {
    "e4m3": Element(torch.float8_e4m3fn, 448.0, 8),
    "e5m2": Element(torch.float8_e5m2, 57344.0, 15),
}
INT8 = Element(torch.int8, 127.0, 6)
