"""A layer as a list of steps over named buffers.

A buffer is a matrix of rows, a row a token. Steps read and write ranges of rows; what a step needs
besides (weights, numbers) it names. A program says nothing about addresses: that is `plan`.

Most buffers live within a run. State outlives it: a key-value cache. Scalars are set between runs,
and read where the steps run, so that what was launched once (a CUDA graph) serves every position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CHUNK = 512
"""Tokens at a time: beyond a few hundred, weights are reused enough for the arithmetic to count."""

# Bytes of an element, by the names that numpy and torch share.
ITEM_BYTES = {"float16": 2, "float32": 4, "int32": 4, "uint8": 1}

Value = int | float | str


@dataclass(frozen=True)
class Buffer:
    """[rows, columns] of a dtype, the rows one after the other."""

    name: str
    rows: int
    columns: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        assert min(self.rows, self.columns) > 0, f"buffer {self.name} is empty"

    @property
    def nbytes(self) -> int:
        """Without alignment."""
        return self.rows * self.columns * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Rows:
    """Rows start … start + count − 1 of a buffer."""

    buffer: str
    start: int
    count: int

    def overlaps(self, other: Rows) -> bool:
        """Whether a row is in both."""
        return self.buffer == other.buffer and (
            self.start < other.start + other.count and other.start < self.start + self.count
        )


@dataclass(frozen=True)
class Step:
    """One call of a kernel, by its name in `kernels`.

    reads, writes: the kernel's arguments that are rows of buffers. weights: arguments that the
    packed layer has, by name. values: all others. in_place: pairs (read argument, written
    argument) that may be the same memory. A written buffer that is read as well (`updates`)
    keeps what is not written.
    """

    kernel: str
    reads: Mapping[str, Rows]
    writes: Mapping[str, Rows]
    weights: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)
    in_place: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Program:
    """Steps, the buffers that they use, and which of these are input and output.

    The output may be the input's own buffer: the steps then write over the input, and only then.
    `state` and `scalars` are buffers besides. Raises ValueError for a program that reads rows that
    were never written, leaves a buffer, writes a scalar, or into an input that is not the output,
    or does not write all of the output.
    """

    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    input: str
    output: str
    state: tuple[Buffer, ...] = ()
    scalars: tuple[Buffer, ...] = ()

    def __post_init__(self) -> None:
        every = (*self.buffers, *self.state, *self.scalars)
        known = {buffer.name: buffer for buffer in every}
        if len(known) != len(every):
            raise ValueError("two buffers of one name")
        for name in (self.input, self.output):
            if name not in {buffer.name for buffer in self.buffers}:
                raise ValueError(f"there is no buffer {name}")
        fixed = {buffer.name for buffer in self.scalars}
        written = _Written({self.input, *self.outside})
        for step in self.steps:
            for rows in (*step.reads.values(), *step.writes.values()):
                size = known[rows.buffer].rows if rows.buffer in known else 0
                if rows.start < 0 or not 0 < rows.count <= size - rows.start:
                    raise ValueError(f"{step.kernel}: no such rows: {rows}")
            for rows in step.reads.values():
                if rows not in written:
                    raise ValueError(f"{step.kernel}: {rows} are read before they are written")
            for rows in step.writes.values():
                if rows.buffer == self.input != self.output:
                    raise ValueError(f"{step.kernel}: writes into the input {self.input}")
                if rows.buffer in fixed:
                    raise ValueError(f"{step.kernel}: writes the scalar {rows.buffer}")
                written.add(rows, known[rows.buffer].rows)
        if Rows(self.output, 0, known[self.output].rows) not in written:
            raise ValueError(f"not all of the output {self.output} is written")

    @property
    def outside(self) -> frozenset[str]:
        """Names of state and scalars: no part of what runs reuse."""
        return frozenset(buffer.name for buffer in (*self.state, *self.scalars))

    def lifetimes(self) -> dict[str, tuple[int, int]]:
        """First and last step that touch each buffer: the input from −1, the output to the end.
        State and scalars are not among them."""
        found: dict[str, tuple[int, int]] = {self.input: (-1, -1)}
        outside = self.outside
        for number, step in enumerate(self.steps):
            for rows in (*step.reads.values(), *step.writes.values()):
                if rows.buffer not in outside:
                    first, _ = found.get(rows.buffer, (number, number))
                    found[rows.buffer] = (first, number)
        found[self.output] = (found[self.output][0], len(self.steps))
        if self.input != self.output:
            # The caller's: it must outlive the last step as well.
            found[self.input] = (-1, len(self.steps))
        return found


class _Written:
    """Which rows were written. Most buffers are written as a whole; of the others, ranges."""

    def __init__(self, whole: set[str]) -> None:
        self._whole = whole
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    def __contains__(self, rows: Rows) -> bool:
        ranges = self._ranges.get(rows.buffer, ())
        return rows.buffer in self._whole or any(
            first <= rows.start and rows.start + rows.count <= last for first, last in ranges
        )

    def add(self, rows: Rows, size: int) -> None:
        """`size` is the rows of the whole buffer."""
        if rows in self:
            return
        start, stop = rows.start, rows.start + rows.count
        apart = []
        for first, last in self._ranges.get(rows.buffer, ()):
            if last < start or stop < first:
                apart.append((first, last))
            else:
                start, stop = min(start, first), max(stop, last)
        if stop - start == size:
            self._whole.add(rows.buffer)
        else:
            self._ranges[rows.buffer] = [*apart, (start, stop)]
