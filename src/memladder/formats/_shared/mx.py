"""Microscaling: blocks of 32 elements along K share one power of two, an E8M0 byte.

Source: OCP Microscaling Formats (MX) Specification v1.0. Section 5.4.1: E8M0 is an exponent with
bias 127, 2^-127 to 2^127, 0xFF is NaN. Section 6.3, with the scale left to the implementation and
the rest prescribed: the scale is the largest power of two not above the block's absmax, divided by
the largest power of two of the element; elements are rounded to nearest, ties to even, and
saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memladder.formats._shared.base import absmax

BLOCK = 32
_BIAS = 127
_NAN = 255
# binary32: an E8M0 byte is its exponent field, but for the two ends of the range.
_MANTISSA = 23
_SMALLEST = 1 << (_MANTISSA - 1)  # 2^-127, a subnormal
_QUIET_NAN = 0x7FC0_0000


def scale_codes(blocks: Tensor, exponent: int) -> Tensor:
    """E8M0 codes [..., 1] of blocks [..., 32]; `exponent` is that of the element's largest 2^n.

    A block of zeros has the smallest scale; a block with NaN or infinity the scale NaN.
    """
    most = absmax(blocks)
    # frexp's mantissa is in [0.5, 1), so that its exponent is one above the floor of log2.
    floor = torch.frexp(most).exponent - 1
    codes = (floor - exponent + _BIAS).clamp_(0, _NAN - 1)
    codes = torch.where(most == 0, 0, codes)
    return torch.where(most.isfinite(), codes, _NAN).to(torch.uint8)


def scale_values(codes: Tensor) -> Tensor:
    """E8M0 codes as float32: exactly 2^(code − 127), NaN for 255."""
    bits = codes.int() << _MANTISSA
    bits = torch.where(codes == 0, _SMALLEST, bits)
    return torch.where(codes == _NAN, _QUIET_NAN, bits).view(torch.float32)


def scaled(blocks: Tensor, codes: Tensor) -> Tensor:
    """Blocks divided by their scales: exact, for only exponents change."""
    return blocks / scale_values(codes)
