"""A tensor of the model as a choice of a node's columns: what layout operators become.

The axes of a tensor are made of factors (`axes`). A reshape regroups them, a transpose orders them
anew; columns are indices into the node's. So
[batch, heads, seq, head_dim] of a fused projection is a view of its [tokens, columns], and
repeated heads of keys are indices that occur more than once.

A value is a sum of terms: columns times a scale and a table by position. Rotary positions are such
a sum, however they are spelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memladder.core.case import Workload
from memladder.engine.frontend.axes import (
    Axes,
    Axis,
    LayoutError,
    align,
    columns_of,
    merged,
    places_of,
    regroup,
    same_for_all,
    shape_of,
)
from memladder.engine.graph.nodes import Node


@dataclass(frozen=True, eq=False)
class Term:
    """index [columns…]: which of the node's columns; times `scale`, and `table` [seq_len or 1,
    columns or 1 …]."""

    index: np.ndarray
    scale: float = 1.0
    table: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the model: a sum of terms over one node, its axes in factors."""

    node: Node
    axes: Axes
    terms: tuple[Term, ...]
    tokens: Workload

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the model."""
        return shape_of(self.axes, self.tokens)

    @property
    def columns(self) -> tuple[int, ...]:
        """Sizes of all column factors in order: the shape of every term's index."""
        return tuple(f for axis in self.axes for f in axis if isinstance(f, int))

    def map_terms(self, axes: Axes, columns: Sequence[int]) -> Value:
        """Other axes, for which the terms' columns are reshaped."""
        return replace(self, axes=axes, terms=tuple(_reshaped(t, columns) for t in self.terms))

    def merged(self) -> Value:
        """Each axis' neighbouring column factors made one."""
        axes = tuple(merged(axis) for axis in self.axes)
        return self.map_terms(axes, columns_of(axes))


def whole(node: Node, axes: Axes, tokens: Workload) -> Value:
    """All of a node's columns, in order, spread over the axes' column factors."""
    columns = columns_of(axes)
    assert math.prod(columns) == node.columns
    return Value(node, axes, (Term(np.arange(node.columns).reshape(columns)),), tokens)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    """ONNX's Reshape, to sizes that are all known."""
    axes = regroup(value.merged().axes, shape, value.tokens)
    return value.map_terms(axes, columns_of(axes))


def transpose(value: Value, order: Sequence[int]) -> Value:
    """Axis i of the result is axis order[i]."""
    value = value.merged()
    places = places_of(value.axes)
    moved = [place for axis in order for place in places[axis]]
    axes = tuple(value.axes[axis] for axis in order)

    def move(term: Term) -> Term:
        table = term.table
        if table is not None:
            table = table.transpose(0, *(place + 1 for place in moved))
        return replace(term, index=term.index.transpose(moved), table=table)

    return replace(value, axes=axes, terms=tuple(map(move, value.terms)))


def take(value: Value, axis: int, index: np.ndarray | int) -> Value:
    """Elements of an axis of columns; an axis of tokens can only be taken whole, in order."""
    value = value.merged()
    size = value.shape[axis]
    picked = np.arange(size)[index]
    gone = picked.ndim == 0
    if picked.ndim > 1:
        raise LayoutError("an index of several axes")
    if np.array_equal(picked, np.arange(size)) and not gone:
        return value
    if size == 1:
        if gone:
            return replace(value, axes=value.axes[:axis] + value.axes[axis + 1 :])
        return expand(value, [len(picked) if a == axis else n for a, n in enumerate(value.shape)])
    factors = value.axes[axis]
    if len(factors) != 1 or not isinstance(factors[0], int):
        raise LayoutError("some of the tokens are taken, and not all of them")
    (place,) = places_of(value.axes)[axis]
    # The axis stays, of length 1, until it is dropped from the shape.
    kept = picked.reshape(-1)

    def pick(term: Term) -> Term:
        table = term.table
        if table is not None and table.shape[place + 1] > 1:
            table = table.take(kept, place + 1)
        return replace(term, index=term.index.take(kept, place), table=table)

    new: Axis = (len(kept),)
    axes = (*value.axes[:axis], new, *value.axes[axis + 1 :])
    found = replace(value, axes=axes, terms=tuple(map(pick, value.terms)))
    if len(kept) > 1 and not gone:
        return found
    rest = () if gone else ((),)
    axes = (*value.axes[:axis], *rest, *value.axes[axis + 1 :])
    return found.map_terms(axes, columns_of(axes))


def expand(value: Value, shape: Sequence[int]) -> Value:
    """ONNX's Expand: axes of size 1 are repeated, as columns; missing ones come in front."""
    value = value.merged()
    axes: Axes = ((),) * (len(shape) - len(value.axes)) + value.axes
    old = shape_of(axes, value.tokens)
    new: list[Axis] = []
    for axis, before, after in zip(axes, old, shape, strict=True):
        if before != after and 1 not in (before, after):
            raise LayoutError(f"{old} does not expand to {tuple(shape)}")
        new.append((after,) if before == 1 < after else axis)
    # An index of size 1 where there will be more, then repeated.
    kept = tuple(
        1 if before == 1 < after else f
        for axis, before, after in zip(new, old, shape, strict=True)
        for f in axis
        if isinstance(f, int)
    )
    columns = columns_of(tuple(new))

    def repeat(term: Term) -> Term:
        found = _reshaped(term, kept)
        return replace(found, index=np.broadcast_to(found.index, columns))

    return replace(value, axes=tuple(new), terms=tuple(map(repeat, value.terms)))


def concat(values: Sequence[Value], axis: int) -> Value:
    """Values of one node, joined along an axis of columns."""
    # An axis of size 1 is a column factor here: only so can it be joined.
    whole_axes = [with_columns(value.merged(), axis) for value in values]
    first = whole_axes[0]
    if any(
        v.axes[:axis] + v.axes[axis + 1 :] != first.axes[:axis] + first.axes[axis + 1 :]
        for v in whole_axes
    ):
        raise LayoutError("parts whose tokens or columns lie in other axes")
    place = sum(isinstance(f, int) for a in first.axes[:axis] for f in a)
    count = max(len(value.terms) for value in whole_axes)
    terms = []
    for number in range(count):
        parts = [_term(value, number) for value in whole_axes]
        index = np.concatenate([part.index for part in parts], place)
        scales = {part.scale for part in parts}
        if len(scales) == 1 and all(part.table is None for part in parts):
            terms.append(Term(index, scales.pop()))
            continue
        tables = [_full_table(part, place) for part in parts]
        widest = np.broadcast_shapes(*(_without(t.shape, place + 1) for t in tables))
        spread = [
            np.broadcast_to(t, (*widest[: place + 1], t.shape[place + 1], *widest[place + 1 :]))
            for t in tables
        ]
        terms.append(Term(index, 1.0, np.concatenate(spread, place + 1)))
    size = sum(value.shape[axis] for value in whole_axes)
    axes = (*first.axes[:axis], (size,), *first.axes[axis + 1 :])
    return Value(first.node, axes, tuple(terms), first.tokens)


def scaled(value: Value, factor: float) -> Value:
    """The value times a number."""
    if factor == 1.0:
        return value
    terms = tuple(replace(term, scale=term.scale * factor) for term in value.terms)
    return replace(value, terms=terms)


def times(value: Value, array: np.ndarray) -> Value:
    """The value times a constant that is broadcast against it, but does not broadcast it."""
    value = value.merged()
    factors = np.asarray(table(value, array), np.float32)
    terms = tuple(
        replace(term, table=factors if term.table is None else term.table * factors)
        for term in value.terms
    )
    return replace(value, terms=terms)


def add(one: Value, other: Value) -> Value:
    """The sum of two values of one node and one shape."""
    one, other = refined(one, other)
    return replace(one, terms=one.terms + other.terms)


def refined(one: Value, other: Value) -> tuple[Value, Value]:
    """Both with the same axes, column factors as long as both allow."""
    if one.shape != other.shape:
        raise LayoutError(f"{one.shape} and {other.shape} are not of one shape")
    one, other = one.merged(), other.merged()
    if one.axes != other.axes:
        raise LayoutError("tokens lie in other axes")
    return one, other


def table(value: Value, array: np.ndarray) -> np.ndarray:
    """A constant that is broadcast against the value, as [seq_len or 1, columns or 1 …].

    Raises LayoutError where sequences of the batch would get different numbers.
    """
    aligned = align(value.axes, array, value.tokens)
    kinds = [f for axis in value.axes for f in axis]
    aligned = same_for_all(aligned, [place for place, f in enumerate(kinds) if f == "b"])
    order = [place for place, f in enumerate(kinds) if f == "s"]
    order += [place for place, f in enumerate(kinds) if isinstance(f, int)]
    batch = [place for place, f in enumerate(kinds) if f == "b"]
    aligned = aligned.transpose(*batch, *order)
    aligned = aligned.reshape(aligned.shape[len(batch) :])
    return aligned if "s" in kinds else aligned[np.newaxis]


def _reshaped(term: Term, columns: Sequence[int]) -> Term:
    table = term.table
    if term.index.shape == tuple(columns):
        return term
    if table is not None:
        if table.shape[1:] != term.index.shape and math.prod(table.shape[1:]) > 1:
            # Only a full table can be cut anew.
            table = np.broadcast_to(table, (len(table), *term.index.shape))
        size = (1,) * len(columns) if math.prod(table.shape[1:]) == 1 else columns
        table = table.reshape(len(table), *size)
    return replace(term, index=term.index.reshape(columns), table=table)


def with_columns(value: Value, axis: int) -> Value:
    """An axis of size 1 is a column factor too. Raises LayoutError for an axis of tokens."""
    if value.axes[axis]:
        if not all(isinstance(f, int) for f in value.axes[axis]):
            raise LayoutError("tokens where columns are wanted")
        return value
    axes = (*value.axes[:axis], (1,), *value.axes[axis + 1 :])
    return value.map_terms(axes, columns_of(axes))


def _term(value: Value, number: int) -> Term:
    if number < len(value.terms):
        return value.terms[number]
    return Term(np.zeros(value.columns, int), 0.0)


def _full_table(term: Term, place: int) -> np.ndarray:
    """The term's factors, as long as the index along one of its axes."""
    ones = np.ones((1,) * (term.index.ndim + 1))
    found = np.asarray((ones if term.table is None else term.table) * term.scale)
    size = list(found.shape)
    size[place + 1] = term.index.shape[place]
    return np.broadcast_to(found, size)


def _without(shape: tuple[int, ...], place: int) -> tuple[int, ...]:
    return shape[:place] + shape[place + 1 :]
