"""A weight as kernels read it: codes in their layout, scales beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memladder.formats._shared.base import Format, Quantised
from memladder.kernels.layout import Layout


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [rows, columns] = [out, in] in a format.

    codes: uint8 of the layout's shape. scales [groups, rows] in the format's scale dtype: one
    group's scales of neighbouring rows are contiguous, as the rows of a tile are. zeros uint8
    [groups, rows].
    """

    format: Format
    layout: Layout
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    known_top: int | None = None

    @cached_property
    def top(self) -> int:
        """The largest stored E8M0 scale: what float16 holds of them is relative to it."""
        if self.known_top is not None:
            return self.known_top
        return int(self.scales.max()) if self.scales is not None else 0

    def moved(self, move: Callable[[Tensor], Tensor]) -> PackedMatrix:
        """The same matrix with its tensors elsewhere. `top` is taken along: asking a GPU for it
        would need a kernel."""
        parts = (self.codes, self.scales, self.zeros)
        codes, scales, zeros = (None if part is None else move(part) for part in parts)
        assert codes is not None
        top = self.top if self.format.scale_dtype == torch.uint8 else None
        return PackedMatrix(self.format, self.layout, codes, scales, zeros, top)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.layout.rows

    @property
    def columns(self) -> int:
        """K."""
        return self.layout.columns

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        parts = (self.codes, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    @classmethod
    def pack(cls, kind: Format, matrix: Quantised) -> PackedMatrix:
        """Pack a whole quantised matrix."""
        layout = Layout.of(kind, *matrix.codes.shape)
        scales, zeros = (
            None if part is None else part.t().contiguous()
            for part in (matrix.scales, matrix.zeros)
        )
        return cls(kind, layout, layout.pack(matrix.codes), scales, zeros)

    def unpack(self) -> Quantised:
        """The inverse of `pack`, exactly."""
        return self.tiles(0, self.layout.shape[0], 0, self.layout.shape[1])

    def tiles(self, row: int, rows: int, column: int, columns: int) -> Quantised:
        """`rows` × `columns` tiles from tile (`row`, `column`) on, unpacked.

        A column tile begins at a group's beginning, or lies within one group.
        """
        layout = self.layout
        first = column * layout.tile_columns
        last = min(first + columns * layout.tile_columns, layout.columns)
        stored = self.codes[row : row + rows, column : column + columns]
        codes = layout.unpack(stored, last - first)
        codes = codes[: layout.rows - row * layout.tile_rows]
        rows_ = slice(row * layout.tile_rows, row * layout.tile_rows + codes.shape[0])
        group = self.format.group or layout.columns
        assert first % group == 0 or last <= (first // group + 1) * group
        groups = slice(first // group, -(-last // group))
        return Quantised(
            codes,
            None if self.scales is None else self.scales[groups, rows_].t(),
            None if self.zeros is None else self.zeros[groups, rows_].t(),
        )

    def dequantise(self) -> Tensor:
        """float32 [rows, columns]: for small matrices, and for comparison."""
        return self.format.dequantise(self.unpack())


def matrix_bytes(kind: Format, rows: int, columns: int) -> int:
    """What a packed matrix takes: the format's own arithmetic, and the layout's padding."""
    layout = Layout.of(kind, rows, columns)
    scale = kind.scale_dtype.itemsize if kind.scale_dtype else 0
    return layout.nbytes + rows * kind.groups(columns) * (scale + kind.has_zeros)
