"""Axes of a tensor as factors, in the manner of CuTe's layouts.

`b` are the sequences, `s` the tokens of one (in attention scores `k` the keys), and whole numbers
are columns. A factor of size 1 is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from memladder.core.case import Workload

Factor: TypeAlias = str | int
Axis: TypeAlias = tuple[Factor, ...]
Axes: TypeAlias = tuple[Axis, ...]


class LayoutError(Exception):
    """A layout that tokens and columns do not have; who knows the operator names it."""


def shape_of(axes: Axes, tokens: Workload) -> tuple[int, ...]:
    """Sizes of the axes."""
    return tuple(math.prod(size_of(f, tokens) for f in axis) for axis in axes)


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """NumPy's. Raises LayoutError where they are none of one another."""
    try:
        return np.broadcast_shapes(*map(tuple, shapes))
    except ValueError:
        named = " and ".join(map(str, map(tuple, shapes)))
        raise LayoutError(f"shapes {named} that do not broadcast") from None


def size_of(factor: Factor, tokens: Workload) -> int:
    """How long it is."""
    if isinstance(factor, int):
        return factor
    return tokens.batch_size if factor == "b" else tokens.seq_len


def token_axes(tokens: Workload) -> tuple[Axis, Axis]:
    """[batch_size, seq_len]; a factor of size 1 is left out."""
    return (
        ("b",) if tokens.batch_size > 1 else (),
        ("s",) if tokens.seq_len > 1 else (),
    )


def regroup(axes: Axes, shape: Sequence[int], tokens: Workload) -> Axes:
    """The axes' factors, in order, grouped to another shape. Column factors may be divided.

    >>> regroup((("b",), ("s",), (64,)), (2, 3, 4, 16), Workload(2, 3))
    (('b',), ('s',), (4,), (16,))
    >>> regroup((("b",), (4,), ("s",)), (8, 3), Workload(2, 3))
    (('b', 4), ('s',))
    """
    rest = [f for axis in axes for f in axis]
    found: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            if not rest:
                raise LayoutError(f"{shape_of(axes, tokens)} can't become {tuple(shape)}")
            factor = rest.pop(0)
            own = size_of(factor, tokens)
            if size % own == 0:
                axis.append(factor)
                size //= own
            elif isinstance(factor, int) and factor % size == 0:
                axis.append(size)
                rest.insert(0, factor // size)
                size = 1
            else:
                raise LayoutError(f"{tuple(shape)} tears tokens apart")
        found.append(tuple(axis))
    if rest:
        raise LayoutError(f"{shape_of(axes, tokens)} can't become {tuple(shape)}")
    return tuple(found)


def align(axes: Axes, array: np.ndarray, tokens: Workload) -> np.ndarray:
    """A constant broadcast against the axes, with an axis a factor: the factor's size, or 1."""
    shape = shape_of(axes, tokens)
    if array.ndim > len(shape):
        extra = array.shape[: array.ndim - len(shape)]
        if math.prod(extra) != 1:
            raise LayoutError(f"a constant of shape {array.shape} beside {shape}")
        array = array.reshape(array.shape[len(extra) :])
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    sizes: list[int] = []
    for axis, size, own in zip(axes, shape, array.shape, strict=True):
        if own not in (1, size):
            raise LayoutError(f"a constant of shape {array.shape} beside {shape}")
        sizes += [size_of(f, tokens) if own == size > 1 else 1 for f in axis]
    return array.reshape(sizes)


def same_for_all(array: np.ndarray, places: Iterable[int]) -> np.ndarray:
    """The array's first part along axes that all hold the same. Raises LayoutError if not."""
    for place in places:
        first = array.take([0], place)
        if array.shape[place] > 1 and not all(
            np.array_equal(first.take(0, place), array.take(i, place), equal_nan=True)
            for i in range(1, array.shape[place])
        ):
            raise LayoutError("sequences of the batch have different constants")
        array = first
    return array


def columns_of(axes: Axes) -> tuple[int, ...]:
    """Column factors of all axes, in order."""
    return tuple(f for axis in axes for f in axis if isinstance(f, int))


def merged(axis: Axis) -> Axis:
    """The axis with neighbouring column factors made one."""
    found: list[Factor] = []
    for factor in axis:
        last = found[-1] if found else None
        if isinstance(factor, int) and isinstance(last, int):
            found[-1] = last * factor
        else:
            found.append(factor)
    return tuple(found)


def places_of(axes: Axes) -> list[list[int]]:
    """For each axis, which of the column factors it has."""
    numbers: Iterator[int] = iter(range(len(columns_of(axes))))
    return [[next(numbers) for f in axis if isinstance(f, int)] for axis in axes]
