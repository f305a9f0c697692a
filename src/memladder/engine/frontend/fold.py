"""Operators on constants alone: computed while the model is read.

Layout operators give views, so that a transposed weight is still the mapped file. Everything else
is for shapes, positions and vectors, and is refused for values as large as a weight.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.frontend.onnx_file import BITS, Operator
from memladder.engine.graph.nodes import Array

# A [4096, 4096] matrix of int64: what computes a causal mask.
_MOST_BYTES = 256 << 20
# Of all that is computed and not yet used up.
_MOST_HELD_BYTES = 4 * _MOST_BYTES
# Casts of weights between floats are left out: weights are packed in a format of their own.
_LEAST_WEIGHT_BYTES = 1 << 20
# ONNX's evaluator has loops in Python for most operators; these are numpy's.
_QUICK = frozenset(
    (
        *("Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "Ceil", "Clip", "Concat", "Constant"),
        *("ConstantOfShape", "Cos", "CumSum", "DequantizeLinear", "Div", "Equal", "Erf", "Exp"),
        *("Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "Greater"),
        *("GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max"),
        *("Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Pad", "Pow", "Range"),
        *("Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
        *("Relu", "Reshape", "Round", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice"),
        *("Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose"),
        *("Trilu", "Unsqueeze", "Where", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseNot"),
    )
)
_MOST_SLOW_BYTES = 1 << 17
# Multiplications of a product of constants, and elements of what sizes are computed of.
_MOST_PRODUCTS = 1 << 32
_MOST_SIZES = 1 << 10
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")


class Folder:
    """Computes operators on constants, and counts what that takes."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._held = 0

    def fold(self, operator: Operator, inputs: Sequence[Array | None]) -> list[Array]:
        """The operator's outputs, named after its first input.

        Raises GraphError for what computes on a weight, would need more memory than masks and
        positions of a layer do, or can't be computed.
        """
        given = [None if array is None else array.data for array in inputs]
        name = next((array.name for array in inputs if array is not None), operator.name)
        if operator.op.startswith(_RANDOM):
            raise GraphError(f"unsupported operator {operator}: it is random")
        view = _VIEWS.get(operator.op)
        if view is not None and given and given[0] is not None:
            found = view(operator.attributes, given)
            if found is not None:
                return [Array(name, part) for part in found]
        size = sum(array.nbytes for array in given if array is not None)
        if size > _MOST_BYTES:
            raise GraphError(
                f"unsupported operator {operator}: it computes on a weight ({size} bytes)"
            )
        self._require(operator, given, size, _output_bytes(operator, given, self._opset))
        return [
            Array(name, self._counted(np.asarray(part)))
            for part in _computed(operator, given, self._opset)
        ]

    def _require(
        self, operator: Operator, given: Sequence[np.ndarray | None], size: int, made: int | None
    ) -> None:
        """Raise GraphError unless the operator's outputs, `made` bytes, may be computed."""
        if made is None:
            raise GraphError(f"unsupported operator {operator}: its output's size is not known")
        quick = operator.op in _QUICK or _is_short_product(operator, given, made)
        most = _MOST_BYTES if quick else _MOST_SLOW_BYTES
        if max(size, made) > most:
            raise GraphError(
                f"operator {operator} on constants takes {max(size, made):,} bytes; "
                f"{most:,} are the most"
            )
        if self._held + made > _MOST_HELD_BYTES:
            raise GraphError(
                f"operator {operator} on constants: {self._held + made:,} bytes of constants are "
                f"computed; {_MOST_HELD_BYTES:,} are the most"
            )

    def _counted(self, array: np.ndarray) -> np.ndarray:
        """The array; its bytes count until it and all views of it are gone."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self._held += owner.nbytes
        weakref.finalize(owner, self._release, owner.nbytes)
        return array

    def _release(self, nbytes: int) -> None:
        self._held -= nbytes


def _is_short_product(operator: Operator, given: Sequence[np.ndarray | None], made: int) -> bool:
    """Is it a product of matrices of floats, not too long a one?"""
    if operator.op not in ("MatMul", "Gemm") or given[0] is None:
        return False
    longest = max(given[0].shape, default=1)
    return given[0].dtype == np.float32 and made // 4 * longest <= _MOST_PRODUCTS


def _output_bytes(operator: Operator, given: Sequence[np.ndarray | None], opset: int) -> int | None:
    """Bytes of all outputs, by ONNX's rules of shapes; None where these do not tell."""
    from onnx import TensorProto, defs, helper, numpy_helper, shape_inference

    named = {
        name: array
        for name, array in zip(operator.inputs, given, strict=True)
        if name and array is not None
    }
    if operator.op in ("NonZero", "Compress", "Unique"):
        return 8 * sum(array.size * max(array.ndim, 1) for array in named.values())
    types = {
        name: helper.make_tensor_type_proto(
            helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in named.items()
    }
    data = {
        name: numpy_helper.from_array(np.asarray(array, order="C"), name)
        for name, array in named.items()
        if array.size <= _MOST_SIZES
    }
    try:
        schema = defs.get_schema(operator.op, opset)
        found = shape_inference.infer_node_outputs(
            schema, operator.proto, types, data, opset_imports=[helper.make_opsetid("", opset)]
        )
    except Exception as error:
        # A library's rules: any way in which they fail is the same to the user.
        reason = " ".join(str(error).split())[:200]
        raise GraphError(f"operator {operator} on constants can't be computed: {reason}") from None
    total = 0
    for name in filter(None, operator.outputs):
        kind = found[name].tensor_type if name in found else None
        dims = [] if kind is None else kind.shape.dim
        if (
            kind is None
            or not kind.HasField("shape")
            or not all(d.HasField("dim_value") for d in dims)
        ):
            return None
        bits = BITS.get(TensorProto.DataType.Name(kind.elem_type), 64)
        # An array of numpy has a byte at least for each element.
        total += math.prod(d.dim_value for d in dims) * max(bits, 8) // 8
    return total


def _computed(operator: Operator, given: Sequence[np.ndarray | None], opset: int) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    names = [name for name in operator.inputs if name]
    feeds = dict(zip(names, (array for array in given if array is not None), strict=False))
    try:
        if operator.op == "GatherElements":
            # The library's chooses among 64 rows at most.
            data, places = (array for array in given if array is not None)
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
    # A view where there can be one; a copy is computed, and counted.
    try:
        return [given[0].reshape(sizes, copy=False)]
    except ValueError:
        return None


def _expand(attributes: Mapping[str, Any], given: Sequence[Any]) -> _Views:
    del attributes
    shape = np.broadcast_shapes(given[0].shape, tuple(map(int, given[1])))
    if math.prod(shape) * given[0].itemsize > _MOST_BYTES:
        return None
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
