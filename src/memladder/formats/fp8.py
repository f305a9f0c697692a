"""FP8 with one scale a row: per output channel of a weight, per token of an activation.

Source: Micikevicius et al. 2022 (arXiv:2209.05433): the row's largest magnitude is scaled to the
largest finite number of the element (448 for E4M3, 57344 for E5M2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared.base import Format, Quantised, absmax, choose, divided, half
from memladder.formats._shared.elements import ELEMENTS, Element

_SCALES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Fp8(Format):
    """`element` e4m3 or e5m2; `scale` float32 or float16."""

    element: str = "e4m3"
    scale: str = "float32"

    bits = 8
    source = "arXiv:2209.05433"
    is_activation = True
    activation = "fp8"

    def __post_init__(self) -> None:
        choose("fp8: element", self.element, tuple(ELEMENTS))
        choose("fp8: scale", self.scale, tuple(_SCALES))

    @property
    def element_type(self) -> Element:
        """As chosen."""
        return ELEMENTS[self.element]

    @property
    def operand(self) -> torch.dtype:  # type: ignore[override]
        """The element."""
        return self.element_type.dtype

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """As chosen."""
        return _SCALES[self.scale]

    def quantise(self, values: Tensor) -> Quantised:
        """A row of zeros has scale 1."""
        element = self.element_type
        values = values.float()
        most = absmax(values)
        scales = torch.where(most == 0, 1.0, divided(most, element.top))
        if self.scale == "float16":
            scales = half(scales)
        # A float16 scale may vanish; its row then is zero.
        divisor = scales.float()
        divisor = torch.where(divisor == 0, torch.inf, divisor)
        return Quantised(element.encode(values / divisor), scales)

    def decode(self, codes: Tensor) -> Tensor:
        """The elements."""
        return self.element_type.decode(codes)


FORMAT = Fp8
