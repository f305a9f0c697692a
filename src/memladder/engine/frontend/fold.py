"""Operators on constants alone: computed while the model is read.

Layout operators give views, so that a transposed weight is still the mapped file. Everything else
is for shapes, positions and vectors, and is refused for what is as large as a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.graph.nodes import Array

# A [4096, 4096] matrix of int64: what computes a causal mask.
_MOST_BYTES = 256 << 20
# Casts of weights between floats are left out: weights are packed in a format of their own.
_LEAST_WEIGHT_BYTES = 1 << 20


def fold(operator: Operator, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """The operator's outputs, named after its first input."""
    given = [None if array is None else array.data for array in inputs]
    name = next((array.name for array in inputs if array is not None), operator.name)
    view = _VIEWS.get(operator.op)
    if view is not None and given and given[0] is not None:
        found = view(operator.attributes, given)
        if found is not None:
            return [Array(name, part) for part in found]
    size = sum(array.nbytes for array in given if array is not None)
    if size > _MOST_BYTES:
        raise GraphError(f"unsupported operator {operator}: it computes on a weight ({size} bytes)")
    return [Array(name, np.asarray(part)) for part in _computed(operator, given, opset)]


def _computed(operator: Operator, given: Sequence[np.ndarray | None], opset: int) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    names = [name for name in operator.inputs if name]
    feeds = dict(zip(names, (array for array in given if array is not None), strict=True))
    try:
        if operator.op == "GatherElements":
            # The library's chooses among 64 rows at most.
            data, places = feeds.values()
            return [np.take_along_axis(data, places, operator.attributes.get("axis", 0))]
        found: list[Any] = ReferenceEvaluator(_model(operator, opset)).run(None, feeds)
    except Exception as error:
        # A library's evaluator: any way in which it fails is the same to the user.
        reason = " ".join(str(error).split())[:200]
        raise GraphError(f"operator {operator} on constants can't be computed: {reason}") from None
    return found


def _model(operator: Operator, opset: int) -> Any:
    from onnx import helper

    untyped = [helper.make_empty_tensor_value_info(name) for name in operator.inputs if name]
    made = [helper.make_empty_tensor_value_info(name) for name in operator.outputs if name]
    graph = helper.make_graph([operator.proto], "fold", untyped, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@lru_cache(maxsize=1)
def _float_dtypes() -> tuple[np.dtype, ...]:
    import ml_dtypes

    return tuple(map(np.dtype, (np.float16, np.float32, ml_dtypes.bfloat16)))


_Views = list[np.ndarray] | None


def _transpose(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    return [given[0].transpose(attributes.get("perm"))]


def _reshape(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    sizes = [given[0].shape[i] if n == 0 else int(n) for i, n in enumerate(given[1])]
    if attributes.get("allowzero") or 0 in given[0].shape:
        return None
    return [given[0].reshape(sizes)]


def _expand(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    del attributes
    shape = np.broadcast_shapes(given[0].shape, tuple(map(int, given[1])))
    return [np.broadcast_to(given[0], shape)]


def _cast(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    from onnx import helper

    floats = _float_dtypes()
    target = np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
    if given[0].nbytes < _LEAST_WEIGHT_BYTES or given[0].dtype not in floats:
        return None
    return [given[0]] if target in floats else None


def _constant(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    del attributes
    return [given[0]]


_VIEWS: Mapping[str, Callable[[Mapping[str, Any], Sequence[Any]], _Views]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Cast": _cast,
    "Identity": _constant,
}
