"""mxfp4: E2M1 elements in blocks of 32 along K with one power-of-two scale each.

Source: OCP Microscaling Formats (MX) Specification v1.0, table 1 and section 5.3.3: 0, 0.5, 1,
1.5, 2, 3, 4, 6 and their negatives; no NaN, no infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared import mx
from memladder.formats._shared.base import Format, Quantised, grouped, lookup, ungrouped

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-number for number in _MAGNITUDES)])
_SIGN = 8
# The exponent of 4, the largest power of two among them.
_EXPONENT = 2


@dataclass(frozen=True)
class Mxfp4(Format):
    """Codes are sign, two bits of exponent, one of mantissa; scales are E8M0 bytes."""

    bits = 4
    scale_dtype = torch.uint8
    source = "OCP Microscaling Formats (MX) v1.0, section 5.3.3"
    is_interleaved = False

    @property
    def group(self) -> int:
        """The specification's block."""
        return mx.BLOCK

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest, ties to even, saturating at 6."""
        blocks = grouped(values, mx.BLOCK)
        scales = mx.scale_codes(blocks, _EXPONENT)
        elements = mx.scaled(blocks, scales)
        size = elements.abs()
        # Steps of 1/2 up to 2, of 1 up to 4, of 2 from there on; `round` takes ties to even codes.
        codes = torch.where(
            size < 2,
            torch.round(size * 2),
            torch.where(size < 4, torch.round(size) + 2, torch.round(size / 2) + 4),
        ).clamp_(max=7)
        signs = torch.signbit(elements).to(torch.uint8).mul_(_SIGN)
        codes = codes.to(torch.uint8).add_(signs)
        return Quantised(ungrouped(codes, values.shape[1]), scales.squeeze(-1))

    def decode(self, codes: Tensor) -> Tensor:
        """The elements."""
        return lookup(_NUMBERS, codes)

    def scale_values(self, scales: Tensor) -> Tensor:
        """Powers of two."""
        return mx.scale_values(scales)


FORMAT = Mxfp4
