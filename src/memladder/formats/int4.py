"""int4: groups of neighbours along K share an fp16 scale, and an optional zero point.

Source: Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), its round-to-nearest grid. Symmetric: the
scale is absmax / 7.5, so that every value lies within half a step of one of −8 … 7. With zero
point: the scale is (max − min) / 15 over the group and zero, which is then one of the codes. With
`search` a symmetric group takes, of some smaller scales of either sign, the one that loses least:
−8 then stands for the largest magnitude, whatever its sign is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.core.errors import FormatError
from memladder.formats._shared.base import (
    GroupedFormat,
    Quantised,
    absmax,
    grouped,
    half,
    searched,
    ungrouped,
)


@dataclass(frozen=True)
class Int4(GroupedFormat):
    """Codes 0 … 15; 8, or else the group's zero point, stands for zero."""

    zero_point: bool = False
    search: bool = False

    bits = 4
    scale_dtype = torch.float16
    source = "arXiv:2210.17323"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point and self.search:
            raise FormatError("int4: search is for scales without zero_point")

    @property
    def has_zeros(self) -> bool:
        """As chosen."""
        return self.zero_point

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest, ties to even."""
        blocks = grouped(values, self.group_size)
        if self.zero_point:
            low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
            low, high = low.clamp_(max=0), high.clamp_(min=0)
            scales = _stored((high - low) / 15)
            zeros = torch.round(-low / scales.float()).clamp_(0, 15)
        else:
            scales = _stored(_searched(blocks) if self.search else absmax(blocks) / 7.5)
            zeros = torch.full_like(scales, 8.0, dtype=torch.float32)
        codes = (blocks / scales.float()).round_().add_(zeros).clamp_(0, 15).to(torch.uint8)
        return Quantised(
            ungrouped(codes, values.shape[1]),
            scales.squeeze(-1),
            zeros.squeeze(-1).to(torch.uint8) if self.zero_point else None,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """−8 … 7; with zero points 0 … 15, which `dequantise` then moves."""
        return codes.float() if self.zero_point else codes.float().sub_(8)


def _searched(blocks: Tensor) -> Tensor:
    most = absmax(blocks)
    # The signed value of the largest magnitude.
    signed = torch.where(blocks.amax(dim=-1, keepdim=True) == most, most, -most)
    starts = [most / 7.5 * factor for factor in _FACTORS]
    starts += [signed / -8 * factor for factor in _FACTORS]
    starts = [torch.where(start == 0, 1.0, start) for start in starts]
    return searched(blocks, starts, lambda x: x.round().clamp_(-8, 7))


_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def _stored(scales: Tensor) -> Tensor:
    """As fp16; a group whose scale vanishes, or that is zero, has scale 1."""
    stored = half(scales)
    return torch.where(stored == 0, 1.0, stored)


FORMAT = Int4
