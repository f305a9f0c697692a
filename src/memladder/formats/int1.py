"""One bit a weight: its sign, and per output channel the mean magnitude as fp16 scale.

Source: Wang et al. 2023, "BitNet" (arXiv:2310.11453), section 2.1, with the sign of the weight
itself and a scale a channel, as in Rastegari et al. 2016, "XNOR-Net" (arXiv:1603.05279), section
3.1, where the mean magnitude is shown to be the best scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared.base import Format, Quantised, half


@dataclass(frozen=True)
class Int1(Format):
    """Code 1 stands for +1, 0 for −1; zero counts as positive."""

    bits = 1
    scale_dtype = torch.float16
    source = "arXiv:2310.11453, section 2.1; arXiv:1603.05279, section 3.1"
    is_integer = True
    operand = torch.int8
    activation = "int8"

    def quantise(self, values: Tensor) -> Quantised:
        """Signs, and the rows' mean magnitudes."""
        scales = values.float().abs().mean(dim=1, keepdim=True)
        return Quantised((values >= 0).to(torch.uint8), half(scales))

    def decode(self, codes: Tensor) -> Tensor:
        """±1."""
        return codes.float().mul_(2).sub_(1)

    def integers(self, codes: Tensor) -> Tensor:
        """±1."""
        return codes.to(torch.int8).mul_(2).sub_(1)


FORMAT = Int1
