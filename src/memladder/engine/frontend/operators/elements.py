"""Elementwise operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memladder.engine.frontend import views
from memladder.engine.frontend.axes import LayoutError, broadcast_shapes
from memladder.engine.frontend.convert import Converter, scalar
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.frontend.operators.operands import (
    Result,
    Rule,
    as_array,
    as_value,
    broadcast,
    constant_last,
)
from memladder.engine.frontend.scores import Scores
from memladder.engine.frontend.views import Value
from memladder.engine.graph.nodes import Array, ByColumn, Linear, Node, Norm, Pointwise

# Rotary positions have two, or four where halves are written apart.
_MOST_TERMS = 8


# A clip without an end: programs hold finite numbers.
_ENDLESS = float(np.finfo(np.float32).max)


def _unary(function: str) -> Rule:
    def rule(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
        return mapped(converter, function, as_value(given[0]))

    return rule


def mapped(converter: Converter, function: str, x: Value, numbers: tuple[float, ...] = ()) -> Value:
    node = converter.flat(x)
    made = Pointwise(node.columns, converter.source, function, (node,), numbers)
    return converter.whole(converter.nodes(made), x.axes)


def _tanh(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    if isinstance(given[0], Scores):
        return given[0].tanh()
    return mapped(converter, "tanh", as_value(given[0]))


_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _gelu(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    kind = operator.attributes.get("approximate", "none")
    if kind not in _GELU:
        raise LayoutError(f"approximate {kind!r}; {', '.join(_GELU)} are known")
    return mapped(converter, _GELU[kind], as_value(given[0]))


def _swish(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    alpha = float(operator.attributes.get("alpha", 1.0))
    x = as_value(given[0])
    if alpha == 1.0:
        return mapped(converter, "silu", x)
    gate = mapped(converter, "sigmoid", views.scaled(x, alpha))
    return both(converter, "mul", x, gate)


def _neg(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    return views.scaled(as_value(given[0]), -1.0)


def _pow(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    return mapped(converter, "pow", as_value(given[0]), (_number(operator, given, 1),))


def _clip(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    least, most = -_ENDLESS, _ENDLESS
    if len(given) > 1 and given[1] is not None:
        least = _number(operator, given, 1)
    if len(given) > 2 and given[2] is not None:
        most = _number(operator, given, 2)
    return mapped(converter, "clip", as_value(given[0]), (least, most))


def _number(operator: Operator, given: Sequence[Any], place: int) -> float:
    number = scalar(as_array(operator, given, place))
    if number is None:
        raise LayoutError(f"an input {place} that is not one number")
    return number


def _extreme(function: str) -> Rule:
    def rule(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
        x, bound = constant_last(given)
        number = scalar(bound) if isinstance(bound, Array) else None
        if number is None or len(given) != 2:
            raise LayoutError("an operand that is not a number")
        if isinstance(x, Scores):
            if function == "max" and number <= -1e4:
                return x.floored(number)
            raise LayoutError("scores that are clipped")
        limits = (number, _ENDLESS) if function == "max" else (-_ENDLESS, number)
        return mapped(converter, "clip", as_value(x), limits)

    return rule


def _mul(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, other = constant_last(given)
    if not isinstance(other, Array):
        return both(converter, "mul", as_value(x), as_value(other))
    number = scalar(other)
    if isinstance(x, Scores):
        if number is None:
            raise LayoutError("scores times several numbers")
        return x.scaled(number)
    x = broadcast(as_value(x), other.data.shape)
    return views.times(x, other.data) if number is None else views.scaled(x, number)


def _div(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, other = given
    if isinstance(other, Array):
        inverse = Array(other.name, 1.0 / np.asarray(other.data, np.float32))
        return _mul(converter, operator, [x, inverse])
    if isinstance(x, Array):
        return _mul(converter, operator, [mapped(converter, "reciprocal", as_value(other)), x])
    return both(converter, "div", as_value(x), as_value(other))


def _add(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, other = constant_last(given)
    if not isinstance(other, Array):
        return both(converter, "add", as_value(x), as_value(other))
    if isinstance(x, Scores):
        return x.plus(other.data)
    return plus(converter, as_value(x), other)


def _sub(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, other = given
    if isinstance(other, Array):
        return _add(converter, operator, [x, Array(other.name, -np.asarray(other.data))])
    negative = views.scaled(as_value(other), -1.0)
    if isinstance(x, Array):
        return _add(converter, operator, [negative, x])
    return both(converter, "add", as_value(x), negative)


def plus(converter: Converter, x: Value, other: Array) -> Value:
    """A constant added: a number, or a vector by column."""
    x = broadcast(x, other.data.shape)
    number = scalar(other)
    if number == 0.0:
        return x
    node = converter.flat(x)
    flat = converter.whole(node, x.axes).merged()
    numbers = views.table(flat, np.asarray(other.data, np.float32))
    if (numbers != numbers[:1]).any():
        raise LayoutError("numbers by position that are added")
    offset = np.ascontiguousarray(np.broadcast_to(numbers[0], flat.columns)).reshape(-1)
    return converter.whole(_offset(converter, node, offset, number), x.axes)


def _offset(converter: Converter, node: Node, offset: np.ndarray, number: float | None) -> Node:
    nodes = converter.nodes
    if isinstance(node, Linear) and node.bias is None:
        return nodes(Linear(node.columns, node.source, node.x, node.weight, offset))
    if isinstance(node, Norm) and node.bias is None:
        return nodes(replace(node, bias=offset))
    if number is not None:
        return nodes(Pointwise(node.columns, converter.source, "plus", (node,), (number,)))
    return nodes(ByColumn(node.columns, converter.source, node, None, offset))


def both(converter: Converter, function: str, x: Value, other: Value) -> Value:
    """A function of two activations."""
    shape = broadcast_shapes(x.shape, other.shape)
    x, other = views.refined(broadcast(x, shape), broadcast(other, shape))
    if function == "add" and x.node is other.node:
        found = views.add(x, other)
        # A sum of sums of itself would have twice as many terms with each operator.
        return found if len(found.terms) <= _MOST_TERMS else converter.settled(found)
    one, two = converter.flat(x), converter.flat(other)
    made = Pointwise(one.columns, converter.source, function, (one, two))
    return converter.whole(converter.nodes(made), x.axes)


def _where(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    condition, yes, no = given
    if not isinstance(condition, Array):
        raise LayoutError("a condition that depends on the hidden states")
    kept, x, other = (True, yes, no) if isinstance(no, Array) else (False, no, yes)
    chosen = np.asarray(condition.data) == kept
    if isinstance(x, Scores) and isinstance(other, Array):
        if broadcast_shapes(x.shape, chosen.shape, other.data.shape) != x.shape:
            raise LayoutError("scores that are repeated")
        if chosen.all():
            return x
        number = scalar(other)
        if number is not None and number <= -1e4:
            return x.plus(np.where(chosen, 0.0, number))
    raise LayoutError("a choice that masks no scores")


TABLE: Mapping[str, Rule] = {
    "Neg": _neg,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Pow": _pow,
    "Clip": _clip,
    "Max": _extreme("max"),
    "Min": _extreme("min"),
    "Where": _where,
    "Tanh": _tanh,
    "Gelu": _gelu,
    "Swish": _swish,
    **{
        op: _unary(op.lower())
        for op in ("Sigmoid", "Erf", "Relu", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Softplus")
    },
}
