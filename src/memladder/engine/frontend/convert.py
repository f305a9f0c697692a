"""Operator by operator from an ONNX model to canonical nodes.

`operators.TABLE` says what an operator does to values, `scores` what attention is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from memladder.core.case import Workload
from memladder.core.errors import GraphError
from memladder.engine.frontend import onnx_file, rules, views
from memladder.engine.frontend.axes import Axes, LayoutError, merged, token_axes
from memladder.engine.frontend.fold import Folder
from memladder.engine.frontend.guard import blamed
from memladder.engine.frontend.onnx_file import Model, Operator
from memladder.engine.frontend.positions import PositionError, read_rotation
from memladder.engine.frontend.scores import Scores
from memladder.engine.frontend.views import Term, Value
from memladder.engine.graph.nodes import (
    Array,
    ByColumn,
    Columns,
    Concat,
    Graph,
    Input,
    Linear,
    Node,
    Nodes,
    Norm,
    Pointwise,
    Rotary,
    Weight,
)

# Numbers in float32, multiplied and divided, are this near to one another.
_ALIKE = 1e-6

Operand: TypeAlias = Array | Value | Scores | None


def load(path: Path, given: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The canonical graph of the layer in an ONNX file. `given`: see `onnx_file.read`.

    Raises GraphError, one line, for a file that can't be read and for operators, types and layouts
    that are not supported; it names operator and node.
    """
    with blamed(f"{path}"):
        model = onnx_file.read(path, given)
    return convert(model)


def convert(model: Model) -> Graph:
    """The canonical graph of a model that was read."""
    converter = Converter(model.shape)
    folder = Folder(model.opset)
    entry = converter.nodes(Input(model.hidden_size, model.input))
    axes = (*token_axes(model.shape), (model.hidden_size,))
    values: dict[str, Operand] = dict(model.constants)
    values[model.input] = views.whole(entry, axes, model.shape)
    last = {name: number for number, o in enumerate(model.operators) for name in o.inputs}
    for number, operator in enumerate(model.operators):
        given = [values[name] if name else None for name in operator.inputs]
        with blamed(f"operator {operator}"):
            found = _made(converter, folder, operator, given)
        values |= dict(zip(operator.outputs, found, strict=False))
        for name in {*operator.inputs, *operator.outputs}:
            # Values computed of constants may be large; each goes with its last reader.
            if last.get(name, -1) <= number and name != model.output:
                values.pop(name, None)
    with blamed(f"output {model.output!r}"):
        return _finished(converter, model, entry, values.get(model.output))


def _made(
    converter: Converter, folder: Folder, operator: Operator, given: list[Operand]
) -> list[Operand]:
    """What an operator gives."""
    from memladder.engine.frontend.operators import TABLE

    if all(isinstance(operand, Array | None) for operand in given):
        return list(folder.fold(operator, given))  # type: ignore[arg-type]
    if operator.op not in TABLE:
        raise GraphError(f"unsupported operator {operator}")
    converter.operator = operator
    made = TABLE[operator.op](converter, operator, given)
    return list(made) if isinstance(made, list) else [made]


def _finished(converter: Converter, model: Model, entry: Node, output: Operand) -> Graph:
    if not isinstance(output, Value):
        raise GraphError(f"the output {model.output!r} does not depend on the hidden states")
    shape = (model.shape.batch_size, model.shape.seq_len, model.hidden_size)
    if output.shape != shape:
        raise GraphError(f"the output {model.output!r} is {output.shape}, the input {shape}")
    if _without_ones(output.axes) != _without_ones((*token_axes(model.shape), (shape[2],))):
        raise LayoutError("tokens or columns lie in other axes than the input's")
    last = converter.flat(output)
    return rules.canonical(Graph(model.shape, entry, last), converter.nodes)


def _without_ones(axes: Axes) -> Axes:
    return tuple(tuple(f for f in merged(axis) if f != 1) for axis in axes)


class Converter:
    """Makes nodes of values."""

    def __init__(self, shape: Workload) -> None:
        self.nodes = Nodes()
        self.tokens = shape
        self.operator: Operator | None = None
        self.arrays: dict[object, Array] = {}
        self.selected: dict[tuple[int, bytes], Node] = {}

    @property
    def source(self) -> str:
        """The operator at work."""
        return "" if self.operator is None else self.operator.name

    def whole(self, node: Node, axes: Axes) -> Value:
        """All of a node, as a value of those axes."""
        return views.whole(node, axes, self.tokens)

    def flat(self, value: Value) -> Node:
        """A node whose columns are the value's, in the value's order."""
        settled = self.settled(value)
        return self.select(settled.node, settled.terms[0].index.reshape(-1))

    def settled(self, value: Value) -> Value:
        """The value as columns of one node: scales, tables and sums are made nodes."""
        terms = _simplified(value)
        if len(terms) == 1:
            (term,) = terms
            if term.scale == 1.0 and term.table is None:
                return Value(value.node, value.axes, terms, value.tokens)
            node = self._scaled(self.select(value.node, term.index.reshape(-1)), term)
            return self.whole(node, value.axes)
        if len(terms) == 2 and any(term.table is not None for term in terms):
            return self._rotated(value, terms)
        parts = [self.flat(Value(value.node, value.axes, (t,), value.tokens)) for t in terms]
        found = parts[0]
        for part in parts[1:]:
            found = self.nodes(Pointwise(found.columns, self.source, "add", (found, part)))
        return self.whole(found, value.axes)

    def select(self, node: Node, index: np.ndarray) -> Node:
        """Columns of a node: pushed down to a weight's rows where that can be.

        Each choice is made once, and without recursion: a graph may be deep, and its values read
        more than once.
        """
        waiting = [(node, index)]
        while True:
            one, columns = waiting[-1]
            key = _choice(one, columns)
            if key not in self.selected:
                needed, build = self._pushed(one, columns)
                missing = [part for part in needed if _choice(*part) not in self.selected]
                if missing:
                    waiting.extend(reversed(missing))
                    continue
                self.selected[key] = build([self.selected[_choice(*part)] for part in needed])
            waiting.pop()
            if not waiting:
                return self.selected[key]

    def _pushed(
        self, node: Node, index: np.ndarray
    ) -> tuple[list[tuple[Node, np.ndarray]], Callable[[list[Node]], Node]]:
        """Choices of what the node reads, and how the choice of the node is made of these."""
        made = self.nodes
        size = len(index)
        if np.array_equal(index, np.arange(node.columns)):
            return [], lambda _: node
        if isinstance(node, Linear):
            weight = Weight(node.weight.array, node.weight.rows[index], node.weight.factor)
            bias = _of(node.bias, index)
            return [], lambda _: made(Linear(size, node.source, node.x, weight, bias))
        if isinstance(node, Columns):
            return [(node.x, node.index[index])], lambda parts: parts[0]
        if isinstance(node, ByColumn):
            by = _of(node.factor, index), _of(node.offset, index)
            return [(node.x, index)], lambda parts: made(ByColumn(size, node.source, parts[0], *by))
        if isinstance(node, Pointwise):
            return [(operand, index) for operand in node.operands], lambda parts: made(
                Pointwise(size, node.source, node.function, tuple(parts), node.numbers)
            )
        if isinstance(node, Norm) and _whole_groups(index, node.group):
            vectors = _of(node.weight, index), _of(node.bias, index)
            return [(node.x, index)], lambda parts: made(
                Norm(size, node.source, parts[0], node.kind, node.group, node.eps, *vectors)
            )
        if isinstance(node, Concat):
            start = 0
            for part in node.parts:
                if start <= index.min() and index.max() < start + part.columns:
                    return [(part, index - start)], lambda parts: parts[0]
                start += part.columns
        return [], lambda _: made(Columns(size, node.source, node, index))

    def _scaled(self, node: Node, term: Term) -> Node:
        if term.table is None:
            numbers = (term.scale,)
            return self.nodes(Pointwise(node.columns, self.source, "scale", (node,), numbers))
        if (term.table != term.table[:1]).any():
            raise LayoutError("numbers by position that are no rotation")
        factor = np.broadcast_to(term.table[0] * term.scale, term.index.shape).reshape(-1)
        return self.nodes(
            ByColumn(node.columns, self.source, node, factor.astype(np.float32), None)
        )

    def _rotated(self, value: Value, terms: tuple[Term, ...]) -> Value:
        """A rotation; its columns are ordered so that halves of a head are paired."""
        dim = value.columns[-1] if value.columns else 1
        factors = np.stack(np.broadcast_arrays(*(_by_head(term, dim) for term in terms)))
        found = np.stack([term.index.reshape(-1, dim) for term in terms])
        # cos 0 = 1 and sin 0 = 0: the first position tells which of the two is the column itself.
        which = np.abs(factors[:, :1]).argmax(axis=0)
        own = np.take_along_axis(found, which, 0)[0]
        found = np.where((factors == 0).all(axis=1), own, found)
        # Each head's own columns, counted from its first: all heads must be alike.
        base = own.min(axis=1, keepdims=True)
        places = found - base
        if (places != places[:, :1]).any() or (np.sort(own[0] - base[0]) != np.arange(dim)).any():
            raise PositionError("heads that are rotated in several ways")
        weight, factors = _unweighted(factors, which, places[:, 0])
        rotation = read_rotation(places[:, 0], factors)
        order = (base + rotation.order).reshape(-1)
        x = self.select(value.node, order)
        if weight is not None:
            weight = np.broadcast_to(weight, own.shape)[:, rotation.order].reshape(1, -1)
            x = self._scaled(x, Term(order, 1.0, weight))
        if rotation.scale != 1.0:
            x = self._scaled(x, Term(order, rotation.scale))
        node: Node = self.nodes(Rotary(x.columns, self.source, x, dim, rotation.frequencies))
        back = np.empty(dim, int)
        back[rotation.order] = np.arange(dim)
        index = np.arange(x.columns).reshape(-1, dim)[:, back].reshape(value.columns)
        return Value(node, value.axes, (Term(index),), value.tokens)


def _choice(node: Node, index: np.ndarray) -> tuple[int, bytes]:
    return id(node), np.ascontiguousarray(index).tobytes()


def _by_head(term: Term, dim: int) -> np.ndarray:
    """The term's factors [seq_len, heads or 1, head_dim]."""
    table = np.ones((1,) * (term.index.ndim + 1)) if term.table is None else term.table
    if not np.isfinite(table).all():
        raise PositionError("numbers by position that are not finite")
    heads = table.shape[1:-1] if math.prod(table.shape[1:-1]) == 1 else term.index.shape[:-1]
    table = np.broadcast_to(table, (len(table), *heads, dim))
    return np.asarray(table.reshape(len(table), -1, dim), np.float64) * term.scale


def _unweighted(
    factors: np.ndarray, which: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """A head's factors [2, seq_len, head_dim], and what its columns were multiplied with before
    they were rotated [heads or 1, head_dim], None if that is one number or nothing.

    factors [2, seq_len, heads or 1, head_dim]; which [1, heads or 1, head_dim]: of the two, that of
    the column itself; places [2, head_dim]: which of a head's columns they are factors of.
    """
    weight = np.take_along_axis(factors[:, 0], which, 0)[0]
    if np.allclose(weight, weight.flat[0], rtol=_ALIKE, atol=0):
        weight_ = None
    else:
        own = np.take_along_axis(places, which[0, :1], 0)[0]
        by_column = np.empty_like(weight)
        by_column[:, own] = np.where(weight == 0, 1.0, weight)
        factors = factors / by_column[:, places].swapaxes(0, 1)[:, np.newaxis]
        weight_ = by_column
    if not np.allclose(factors, factors[:, :, :1], rtol=_ALIKE, atol=_ALIKE):
        raise PositionError("heads that are rotated by several angles")
    return weight_, factors[:, :, 0]


def _simplified(value: Value) -> tuple[Term, ...]:
    """Terms that count: no zeros, equal columns added up, tables of one number made a scale."""
    found: dict[bytes, Term] = {}
    for term in value.terms:
        if term.table is not None and (term.table == term.table.flat[0]).all():
            term = Term(term.index, term.scale * float(term.table.flat[0]))
        if term.scale == 0.0:
            continue
        key = np.ascontiguousarray(term.index).tobytes()
        if key in found:
            term = _sum(found[key], term)
        found[key] = term
    if not found:
        raise LayoutError("a value that is zero")
    return tuple(found.values())


def _sum(one: Term, other: Term) -> Term:
    if one.table is None and other.table is None:
        return Term(one.index, one.scale + other.scale)
    tables = [t.scale * (1.0 if t.table is None else t.table) for t in (one, other)]
    return Term(one.index, 1.0, np.asarray(tables[0] + tables[1]))


def _of(vector: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    return None if vector is None else vector[index]


def _whole_groups(index: np.ndarray, group: int) -> bool:
    """Is each neighbouring `group` of the index one of the node's groups, in any order?"""
    if len(index) % group:
        return False
    own = index.reshape(-1, group)
    first = own[:, :1] // group * group
    return bool((np.sort(own, axis=1) == first + np.arange(group)).all())


def scalar(array: Array) -> float | None:
    """The constant's number, if all of it is one and the same."""
    if not array.data.size or (array.data.size > 1 and (array.data != array.data.flat[0]).any()):
        return None
    return float(array.data.flat[0])
