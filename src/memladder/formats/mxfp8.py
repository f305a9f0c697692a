"""mxfp8: E4M3 elements in blocks of 32 along K with one power-of-two scale each.

Source: OCP Microscaling Formats (MX) Specification v1.0, table 1 and section 5.3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared import mx
from memladder.formats._shared.base import Format, Quantised, choose, grouped, ungrouped
from memladder.formats._shared.elements import ELEMENTS, Element


@dataclass(frozen=True)
class Mxfp8(Format):
    """`element` e4m3 or e5m2; scales are E8M0 bytes."""

    element: str = "e4m3"

    bits = 8
    scale_dtype = torch.uint8
    source = "OCP Microscaling Formats (MX) v1.0, section 5.3.1"
    is_activation = True
    activation = "mxfp8"

    def __post_init__(self) -> None:
        choose("mxfp8: element", self.element, tuple(ELEMENTS))

    @property
    def element_type(self) -> Element:
        """As chosen."""
        return ELEMENTS[self.element]

    @property
    def group(self) -> int:
        """The specification's block."""
        return mx.BLOCK

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest, ties to even, saturating: values above 1.75 of the block's power of two do."""
        element = self.element_type
        blocks = grouped(values, mx.BLOCK)
        scales = mx.scale_codes(blocks, element.exponent)
        codes = element.encode(mx.scaled(blocks, scales))
        return Quantised(ungrouped(codes, values.shape[1]), scales.squeeze(-1))

    def decode(self, codes: Tensor) -> Tensor:
        """The elements."""
        return self.element_type.decode(codes)

    def scale_values(self, scales: Tensor) -> Tensor:
        """Powers of two."""
        return mx.scale_values(scales)


FORMAT = Mxfp8
