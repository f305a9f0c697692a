"""Which rows of a checkpoint's tensors a layer's matrices and vectors are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A tensor's rows, or every `parts`-th block of `block` of them, from block `part` on.

    BLOOM keeps query, key and value of a head next to each other: the keys of all heads are
    `Source(name, parts=3, part=1, block=head_dim)`.
    """

    tensor: str
    parts: int = 1
    part: int = 0
    block: int = 1

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows start … stop of the result as ranges of the tensor's own rows.

        >>> list(Source("qkv", parts=3, part=1, block=4).runs(2, 9))
        [(6, 8), (16, 20), (28, 29)]
        """
        if self.parts == 1:
            yield start, stop
            return
        while start < stop:
            group, row = divmod(start, self.block)
            first = (group * self.parts + self.part) * self.block + row
            size = min(self.block - row, stop - start)
            yield first, first + size
            start += size


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns] = [out, in] of the layer."""

    rows: int
    columns: int
    source: Source


@dataclass(frozen=True)
class Vector:
    """A norm's weight or a bias [size], kept in fp16."""

    size: int
    source: Source
