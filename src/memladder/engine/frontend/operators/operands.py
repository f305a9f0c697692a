"""What an operator's operands are, and the signature that all rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from memladder.engine.frontend import views
from memladder.engine.frontend.axes import LayoutError, broadcast_shapes
from memladder.engine.frontend.convert import Converter, Operand
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.frontend.scores import Scores
from memladder.engine.frontend.views import Value
from memladder.engine.graph.nodes import Array

Result: TypeAlias = Operand | list[Operand]
Rule: TypeAlias = Callable[[Converter, Operator, Sequence[Any]], Result]
"""What an operator makes of its operands. Raises LayoutError, PositionError."""


def as_value(operand: Any) -> Value:
    if isinstance(operand, Value):
        return operand
    what = "scores" if isinstance(operand, Scores) else "constant"
    raise LayoutError(f"a {what} where activations are known only")


def as_array(operator: Operator, given: Sequence[Any], number: int) -> Array:
    operand = given[number]
    if not isinstance(operand, Array):
        raise LayoutError(f"input {number} depends on the hidden states")
    return operand


def integers(operator: Operator, given: Sequence[Any], number: int) -> list[int]:
    return [int(n) for n in np.atleast_1d(as_array(operator, given, number).data)]


def reduced(operator: Operator, given: Sequence[Any], rank: int) -> set[int] | None:
    """Axes that an operator reduces, by input or attribute; all where none are named, and None
    where that is to mean that nothing is done."""
    if len(given) > 1 and given[1] is not None:
        axes = integers(operator, given, 1)
    else:
        axes = list(operator.attributes.get("axes", ()))
    if not axes and operator.attributes.get("noop_with_empty_axes", 0):
        return None
    if any(not -rank <= axis < rank for axis in axes):
        raise LayoutError(f"axes {axes} of {rank}")
    return {axis % rank for axis in axes} or set(range(rank))


def constant_last(given: Sequence[Any]) -> tuple[Any, Any]:
    """A constant second."""
    one, other = given[:2]
    return (other, one) if isinstance(one, Array) else (one, other)


def broadcast(x: Value, shape: Sequence[int]) -> Value:
    wanted = broadcast_shapes(x.shape, shape)
    return x if wanted == x.shape else views.expand(x, wanted)
