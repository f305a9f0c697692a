"""Layout operators: they change a value's view, and make no node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.frontend import views
from memladder.engine.frontend.axes import LayoutError, broadcast_shapes
from memladder.engine.frontend.convert import Converter
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.frontend.operators.operands import Result, Rule, as_array, as_value, integers
from memladder.engine.frontend.scores import Scores
from memladder.engine.graph.nodes import Array, Concat


def _shape(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    sizes = given[0].shape[operator.attributes.get("start", 0) : operator.attributes.get("end")]
    return Array(operator.name, np.array(sizes, np.int64))


def _reshape(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = given[0]
    old = x.shape
    sizes = [old[i] if n == 0 else n for i, n in enumerate(integers(operator, given, 1))]
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = math.prod(old) // known
    return x.reshaped(tuple(sizes)) if isinstance(x, Scores) else views.reshape(x, sizes)


def _flatten(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    axis, shape = operator.attributes.get("axis", 1), given[0].shape
    return views.reshape(given[0], (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _transpose(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    rank = len(as_value(given[0]).axes)
    order = operator.attributes.get("perm", range(rank)[::-1])
    return views.transpose(given[0], [axis % rank for axis in order])


def _squeeze(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    shape = list(given[0].shape)
    if len(given) > 1 and given[1] is not None:
        gone = {axis % len(shape) for axis in integers(operator, given, 1)}
    else:
        gone = {axis for axis, size in enumerate(shape) if size == 1}
    return _reshaped(given[0], [size for axis, size in enumerate(shape) if axis not in gone])


def _unsqueeze(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    shape = list(given[0].shape)
    axes = integers(operator, given, 1)
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return _reshaped(given[0], shape)


def _reshaped(x: Any, shape: Sequence[int]) -> Result:
    return x.reshaped(tuple(shape)) if isinstance(x, Scores) else views.reshape(x, shape)


def _expand(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    shape = broadcast_shapes(given[0].shape, integers(operator, given, 1))
    if isinstance(given[0], Scores):
        return given[0].reshaped(shape)
    return views.expand(given[0], shape)


def _slice(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0])
    starts, stops = (integers(operator, given, i) for i in (1, 2))
    rank = len(x.axes)
    axes = integers(operator, given, 3) if len(given) > 3 and given[3] else range(len(starts))
    steps = integers(operator, given, 4) if len(given) > 4 and given[4] else [1] * len(starts)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = x.shape[axis % rank]
        index = np.arange(size)[slice(start, None if step < 0 and stop < -size else stop, step)]
        x = views.take(x, axis % rank, index)
    return x


def _gather(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, index = as_value(given[0]), as_array(operator, given, 1).data
    axis = operator.attributes.get("axis", 0) % len(x.axes)
    return views.take(x, axis, int(index) if index.ndim == 0 else index)


def _gather_rows(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, index = as_value(given[0]), as_array(operator, given, 1).data
    if operator.attributes.get("batch_dims", 0) or index.ndim != 2 or index.shape[1] != 1:
        raise LayoutError("indices into several axes")
    return views.take(x, 0, index[:, 0])


def _split(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0])
    axis = operator.attributes.get("axis", 0) % len(x.axes)
    size = x.shape[axis]
    if len(given) > 1 and given[1] is not None:
        sizes = integers(operator, given, 1)
    else:
        count = len(operator.outputs)
        part = -(-size // count)
        sizes = [min(part, size - part * i) for i in range(count)]
    stops = np.cumsum(sizes)
    return [
        views.take(x, axis, np.arange(stop - n, stop)) for n, stop in zip(sizes, stops, strict=True)
    ]


def _concat(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    parts = [as_value(part) for part in given]
    axis = operator.attributes["axis"] % len(parts[0].axes)
    if any(part.node is not parts[0].node for part in parts):
        parts = [converter.settled(part) for part in parts]
        distinct = tuple(dict.fromkeys(part.node for part in parts))
        joined = converter.nodes(Concat(sum(n.columns for n in distinct), operator.name, distinct))
        starts = dict(zip(distinct, np.cumsum([0, *(n.columns for n in distinct)]), strict=False))
        parts = [
            replace(
                part,
                node=joined,
                terms=(views.Term(part.terms[0].index + starts[part.node]),),
            )
            for part in parts
        ]
    return views.concat(parts, axis)


def _same(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    found: Result = given[0]
    return found


def _dropout(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    if len(given) > 2 and given[2] is not None and as_array(operator, given, 2).data.any():
        raise LayoutError("a dropout that trains")
    found: Result = given[0]
    return found


def _cast(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    from onnx import TensorProto

    target = TensorProto.DataType.Name(operator.attributes["to"])
    if target not in ("FLOAT", "FLOAT16", "BFLOAT16"):
        raise GraphError(f"unsupported type {target.lower()} of operator {operator}")
    found: Result = given[0]
    return found


TABLE: Mapping[str, Rule] = {
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_rows,
    "Split": _split,
    "Concat": _concat,
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
}
