"""int2: four evenly spaced levels, ±½ and ±1½ steps; groups of 128 along K, fp16 step.

Source: Max 1960, "Quantizing for minimum distortion", table II: for normal values the best step
of four even levels is 0.9957 standard deviations, which leaves a distortion of 0.1188.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared.base import GroupedFormat, Quantised, grouped, half, ungrouped

STEP = 0.9957


@dataclass(frozen=True)
class Int2(GroupedFormat):
    """Codes 0 … 3 stand for −1½, −½, ½, 1½ steps."""

    bits = 2
    scale_dtype = torch.float16
    source = "Max 1960, IRE Transactions on Information Theory 6(1), table II"

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest level; the step is 0.9957 root mean squares of the group."""
        columns = values.shape[1]
        blocks = grouped(values, self.group_size)
        counts = torch.full((blocks.shape[1], 1), float(self.group_size))
        counts[-1] -= -columns % self.group_size
        rms = (blocks.square().sum(dim=-1, keepdim=True) / counts).sqrt_()
        scales = half(STEP * rms)
        divisor = torch.where(scales == 0, 1.0, scales.float())
        codes = torch.floor(blocks / divisor).add_(2).clamp_(0, 3).to(torch.uint8)
        return Quantised(ungrouped(codes, columns), scales.squeeze(-1))

    def decode(self, codes: Tensor) -> Tensor:
        """−1½ … 1½."""
        return codes.float().sub_(1.5)


FORMAT = Int2
