"""nf4: 4-bit NormalFloat, blocks of 64 along K, fp16 absmax.

Source: Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3 and appendix E: the 16 numbers
are quantiles of the normal distribution, scaled to [−1, 1], with an exact zero. With `search` a
block takes, of the absmax and some smaller scales, the one that loses least.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from memladder.formats._shared.base import (
    GroupedFormat,
    Quantised,
    absmax,
    grouped,
    half,
    lookup,
    searched,
    ungrouped,
)

CODE_BOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A value on the middle between two numbers takes the lower one.
_MIDDLES = torch.tensor([(low + high) / 2 for low, high in pairwise(CODE_BOOK)])
_NUMBERS = torch.tensor(CODE_BOOK)
_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Nf4(GroupedFormat):
    """Codes are indices into the code book."""

    group_size: int = 64
    search: bool = False

    bits = 4
    scale_dtype = torch.float16
    source = "arXiv:2305.14314, section 3, appendix E"
    is_interleaved = False

    def quantise(self, values: Tensor) -> Quantised:
        """Nearest number of the code book. A block of zeros has scale 0."""
        blocks = grouped(values, self.group_size)
        scales = half(self._searched(blocks) if self.search else absmax(blocks))
        divisor = torch.where(scales == 0, 1.0, scales.float())
        middles = _MIDDLES.to(blocks.device)
        codes = torch.bucketize(blocks / divisor, middles, out_int32=True).to(torch.uint8)
        return Quantised(ungrouped(codes, values.shape[1]), scales.squeeze(-1))

    def _searched(self, blocks: Tensor) -> Tensor:
        most = absmax(blocks)
        middles, numbers = _MIDDLES.to(blocks.device), _NUMBERS.to(blocks.device)
        starts = [torch.where(most == 0, 1.0, most * factor) for factor in _FACTORS]
        found = searched(
            blocks, starts, lambda x: numbers[torch.bucketize(x, middles, out_int32=True)]
        )
        return torch.where(most == 0, 0.0, found)

    def decode(self, codes: Tensor) -> Tensor:
        """Numbers of the code book, −1 to 1."""
        return lookup(_NUMBERS, codes)


FORMAT = Nf4
