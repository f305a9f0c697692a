"""What a number format is: codes of a few bits, scales shared by groups of them, and back.

A matrix [rows, columns] is quantised along its columns, K of a matrix product: a group is
`group_size` neighbours of one row, or the whole row. Rows are output channels of a weight, or
tokens of an activation; nothing depends on another row, so that a matrix can be quantised in
blocks of rows. Where the columns are no multiple of the group, the last group of a row is shorter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from memladder.core.errors import FormatError
from memladder.formats._shared.elements import Element


@dataclass(frozen=True)
class Quantised:
    """A matrix in a format, one code an element, not packed.

    codes [rows, columns]: uint8, or int16 for a format of 16 bits. scales [rows, groups] in the
    format's `scale_dtype`, None where it has none. zeros uint8 [rows, groups]: zero points.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Format(ABC):
    """A number format with its parameters."""

    bits: ClassVar[int]
    """Bits of a code."""
    scale_dtype: ClassVar[torch.dtype | None] = None
    """How a scale is stored; None where there is none. E8M0 is uint8."""
    source: ClassVar[str]
    """The paper or specification."""
    is_weight: ClassVar[bool] = True
    is_activation: ClassVar[bool] = False
    is_integer: ClassVar[bool] = False
    """Whether a row is integers times one scale, so that products add up as integers."""
    operand: ClassVar[torch.dtype] = torch.float16
    """As what tensor cores multiply its numbers, scales aside."""
    activation: ClassVar[str] = "fp16"
    """Key of the format that activations take by default in products with such weights."""
    is_row: ClassVar[bool] = True
    """Whether ladder has a variant of its own with weights in it."""
    is_interleaved: ClassVar[bool] = True
    """Whether a word's codes are ordered for shifts and masks (`Layout.interleaved`)."""

    def __str__(self) -> str:
        given = [
            f"{field.name}={_text(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        name = type(self).__module__.rpartition(".")[2]
        return f"{name}:{','.join(given)}" if given else name

    @property
    def element_type(self) -> Element | None:
        """The number that a code of 8 bits is; None for other sizes."""
        return None

    @property
    def has_fp8_products(self) -> bool:
        """Whether tensor cores multiply its codes as they are, as 8-bit floating-point numbers."""
        return self.operand.is_floating_point and self.operand.itemsize == 1

    @property
    def scales_rows(self) -> bool:
        """Whether a row has one scale."""
        return self.scale_dtype is not None and self.group is None

    @property
    def group(self) -> int | None:
        """Neighbours along a row that share a scale; None for the whole row."""
        return None

    @property
    def has_zeros(self) -> bool:
        """Whether each group has a zero point, one byte."""
        return False

    @abstractmethod
    def quantise(self, values: Tensor) -> Quantised:
        """Nearest codes of a float matrix [rows, columns]; finite values are assumed.

        Raises FormatError for a value, or a scale, that float16 has to hold and cannot.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """What the codes stand for before their scale: float32 of the same shape."""

    def integers(self, codes: Tensor) -> Tensor:
        """The codes as int8, where `is_integer`: what an integer product multiplies."""
        raise NotImplementedError(f"{self} is no integer format")

    def dequantise(self, matrix: Quantised) -> Tensor:
        """float32 [rows, columns]."""
        values = self.decode(matrix.codes)
        if matrix.scales is None:
            return values
        size = self.group or values.shape[1]
        whole = values.shape[1] // size
        for start, groups in ((0, whole), (whole, matrix.scales.shape[1] - whole)):
            part = values[:, start * size : (start + groups) * size]
            if not part.numel():
                continue
            part = part.view(part.shape[0], groups, -1)
            if matrix.zeros is not None:
                part.sub_(matrix.zeros[:, start : start + groups].float().unsqueeze(-1))
            scales = self.scale_values(matrix.scales[:, start : start + groups])
            part.mul_(scales.unsqueeze(-1))
        return values

    def scale_values(self, scales: Tensor) -> Tensor:
        """Stored scales as float32."""
        return scales.float()

    def groups(self, columns: int) -> int:
        """Scales of one row."""
        if self.scale_dtype is None:
            return 0
        return 1 if self.group is None else -(-columns // self.group)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row, its scales included, without a layout's padding."""
        scale = self.scale_dtype.itemsize if self.scale_dtype else 0
        return -(-self.bits * columns // 8) + self.groups(columns) * (scale + self.has_zeros)

    def bits_per_weight(self, columns: int) -> float:
        """Bits of an element of a row, its share of the scales included."""
        return 8 * self.row_bytes(columns) / columns


@dataclass(frozen=True)
class GroupedFormat(Format):
    """A format whose group can be chosen: `group_size` neighbours along a row."""

    group_size: int = 128

    def __post_init__(self) -> None:
        require_group(self.group_size)

    @property
    def group(self) -> int:
        """As chosen."""
        return self.group_size


def grouped(values: Tensor, size: int) -> Tensor:
    """float32 [rows, groups, size]; a last group that is shorter is filled with zeros."""
    rows, columns = values.shape
    values = functional.pad(values.float(), (0, -columns % size))
    return values.view(rows, -1, size)


def searched(
    blocks: Tensor, starts: Iterable[Tensor], rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """float32 scales [rows, groups, 1] that lose least of blocks [rows, groups, size], of those
    that least squares make of the starts.

    `rounded` gives the nearest numbers of the format, before their scale, for blocks in units of a
    scale. For the numbers q that a start leads to, the scale with the least Σ (w − s·q)² is
    Σ w·q / Σ q²; what is lost is judged after rounding to it again, in float16.
    """
    best = lost = None
    for start in starts:
        numbers = rounded(blocks / start)
        squares = numbers.square().sum(dim=-1, keepdim=True)
        fitted = (blocks * numbers).sum(dim=-1, keepdim=True) / squares
        scales = torch.where(fitted.isfinite() & (fitted.half() != 0), fitted, start).half().float()
        error = (rounded(blocks / scales) * scales - blocks).square().sum(dim=-1, keepdim=True)
        if best is None or lost is None:
            best, lost = scales, error
        else:
            best = torch.where(error < lost, scales, best)
            lost = torch.minimum(error, lost)
    assert best is not None
    return best


def ungrouped(values: Tensor, columns: int) -> Tensor:
    """[rows, groups, size] back to [rows, columns]."""
    return values.flatten(1)[:, :columns]


def lookup(numbers: Tensor, codes: Tensor) -> Tensor:
    """numbers[codes], in the memory order of the codes, [rows, columns]."""
    if not codes.is_contiguous():
        return lookup(numbers, codes.t().contiguous()).t()
    return numbers.to(codes.device).index_select(0, codes.view(-1).int()).view(codes.shape)


def absmax(values: Tensor) -> Tensor:
    """Largest magnitude along the last axis, which is kept: NaN where there is one."""
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    return torch.maximum(high, -low)


def divided(values: Tensor, by: float) -> Tensor:
    """values / by, rounded once on every device: PyTorch multiplies by the inverse on CUDA."""
    return values / torch.full_like(values, by)


def half(scales: Tensor) -> Tensor:
    """Scales as float16. Raises FormatError for one that is too large: values would be NaN."""
    stored = scales.to(torch.float16)
    if torch.isinf(stored).any():
        raise FormatError("a scale beyond 65504 does not fit into float16")
    return stored


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise FormatError unless `value` is allowed."""
    if value not in allowed:
        raise FormatError(f"{name} {value[:40]!r} is not one of {', '.join(allowed)}")


def require_group(size: int) -> None:
    """Raise FormatError unless a group can have that size: kernels read 16 bytes at once."""
    if not 32 <= size <= 1024 or size & (size - 1):
        raise FormatError(f"group_size {size} is not a power of two from 32 to 1024")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
