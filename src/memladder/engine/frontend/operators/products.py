"""Products, norms and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.frontend import scores, views
from memladder.engine.frontend.axes import Axis, LayoutError
from memladder.engine.frontend.convert import Converter
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.frontend.operators.elements import both, plus
from memladder.engine.frontend.operators.operands import Result, Rule, as_array, as_value, integers
from memladder.engine.frontend.scores import Scores
from memladder.engine.frontend.views import Value
from memladder.engine.graph.nodes import Array, Linear, Mean, Norm, Weight


def _matmul(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, other = given
    if isinstance(x, Scores):
        return scores.finish(converter, x, as_value(other))
    if not isinstance(other, Array):
        key = as_value(other)
        last = len(key.axes) - 1
        turned = views.transpose(key, [*range(last - 1), last, last - 1])
        return scores.begin(as_value(x), turned)
    if isinstance(x, Array) or other.data.ndim != 2:
        raise LayoutError("a product that is no linear layer")
    return _linear(converter, x, Array(other.name, other.data.T), 1.0)


def _gemm(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x, weight = given[0], as_array(operator, given, 1)
    attributes = operator.attributes
    if attributes.get("transA"):
        x = views.transpose(as_value(x), (1, 0))
    matrix = weight.data if attributes.get("transB") else weight.data.T
    found = _linear(
        converter, as_value(x), Array(weight.name, matrix), attributes.get("alpha", 1.0)
    )
    if len(given) < 3 or given[2] is None:
        return found
    beta = attributes.get("beta", 1.0)
    if not isinstance(given[2], Array):
        return both(converter, "add", found, views.scaled(as_value(given[2]), beta))
    bias = given[2].data if beta == 1.0 else given[2].data * np.float32(beta)
    return plus(converter, found, Array(given[2].name, bias))


def _linear(converter: Converter, x: Any, weight: Array, alpha: float) -> Value:
    """weight [out, in]."""
    x = as_value(x)
    if weight.data.dtype.kind not in "fV":
        raise GraphError(f"unsupported type {weight.data.dtype} of weight {weight.name!r}")
    rows, columns = weight.data.shape
    if x.shape[-1] != columns or any(isinstance(f, int) for axis in x.axes[:-1] for f in axis):
        raise LayoutError("a product that is no linear layer of each token")
    made = Weight(_interned(converter, weight), np.arange(rows), alpha)
    node = converter.nodes(Linear(rows, weight.name, converter.flat(x), made))
    return converter.whole(node, (*x.axes[:-1], (rows,)))


def _interned(converter: Converter, weight: Array) -> Array:
    """One Array for a stored matrix, so that equal products are one node."""
    data = weight.data
    key = (data.__array_interface__["data"][0], data.shape, data.strides)
    return converter.arrays.setdefault(key, weight)


def _norm(kind: str) -> Rule:
    def rule(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
        x = as_value(given[0]).merged()
        axis = operator.attributes.get("axis", -1) % len(x.axes)
        group = math.prod(x.shape[axis:])
        if any(isinstance(f, str) for a in x.axes[axis:] for f in a):
            raise LayoutError("a norm over tokens")
        node = converter.flat(x)
        # float32 in the file: the number that was meant is the shortest one that rounds to it.
        eps = float(str(np.float32(operator.attributes.get("epsilon", 1e-5))))
        weight, bias = (
            _by_column(x, given[i]) if len(given) > i and given[i] is not None else None
            for i in (1, 2)
        )
        if weight is not None and (weight == 1).all():
            weight = None
        made = Norm(node.columns, operator.name, node, kind, group, eps, weight, bias)
        return converter.whole(converter.nodes(made), x.axes)

    return rule


def _by_column(x: Value, array: Array) -> np.ndarray:
    numbers = views.table(x, np.asarray(array.data, np.float32))
    return np.ascontiguousarray(np.broadcast_to(numbers[0], x.columns)).reshape(-1)


def _mean(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0]).merged()
    axes = integers(operator, given, 1) if len(given) > 1 and given[1] else [-1]
    rank = len(x.axes)
    if [axis % rank for axis in axes] != [rank - 1] or isinstance(x.axes[-1][0], str):
        raise LayoutError("a mean of something else than columns")
    node, group = converter.flat(x), x.shape[-1]
    made = converter.nodes(Mean(node.columns // group, operator.name, node, group))
    keep: tuple[Axis, ...] = ((),) if operator.attributes.get("keepdims", 1) else ()
    return converter.whole(made, (*x.axes[:-1], *keep))


def _softmax(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    if not isinstance(given[0], Scores):
        raise LayoutError("a softmax of something else than attention's scores")
    if operator.attributes.get("axis", -1) not in (-1, len(given[0].axes) - 1):
        raise LayoutError("a softmax over queries")
    return replace(given[0], softmaxed=True)


def _rotary(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0])
    shape, attributes = x.shape, operator.attributes
    cos, sin = (np.asarray(as_array(operator, given, i).data, np.float32) for i in (1, 2))
    if len(given) > 3 and given[3] is not None:
        cos, sin = (part[as_array(operator, given, 3).data] for part in (cos, sin))
    if len(shape) == 3:
        heads = attributes["num_heads"]
        x = views.reshape(x, (*shape[:2], heads, shape[2] // heads))
        cos, sin = cos[:, :, np.newaxis], sin[:, :, np.newaxis]
    else:
        cos, sin = cos[:, np.newaxis], sin[:, np.newaxis]
    half = (attributes.get("rotary_embedding_dim") or x.shape[3]) // 2
    first, second = np.arange(half), np.arange(half, 2 * half)
    if attributes.get("interleaved"):
        first, second = 2 * first, 2 * first + 1
    one, two = views.take(x, 3, first), views.take(x, 3, second)
    turned = [
        views.add(views.times(one, cos), views.times(two, -sin)),
        views.add(views.times(two, cos), views.times(one, sin)),
    ]
    rest = np.arange(2 * half, x.shape[3])
    parts = [*turned, views.take(x, 3, rest)] if len(rest) else turned
    found = views.concat(parts, 3)
    if attributes.get("interleaved"):
        back = np.concatenate((np.arange(2 * half).reshape(2, half).T.reshape(-1), rest))
        found = views.take(found, 3, back)
    return views.reshape(found, shape)


def _attention(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    attributes = operator.attributes
    query, key, value = (as_value(operand) for operand in given[:3])
    if len(given) > 4 and any(operand is not None for operand in given[4:]):
        raise LayoutError("keys and values of earlier tokens")
    flat = len(query.shape) == 3
    if flat:
        query = _heads(query, attributes["q_num_heads"])
        key, value = (_heads(x, attributes["kv_num_heads"]) for x in (key, value))
    made = scores.begin(query, key)
    scale = attributes.get("scale") or 1 / math.sqrt(query.shape[-1])
    made = made.scaled(scale)
    cap = attributes.get("softcap")
    if cap:
        made = made.scaled(1 / cap).tanh().scaled(cap)
    made = replace(made, causal=bool(attributes.get("is_causal", 0)))
    if len(given) > 3 and given[3] is not None:
        mask = as_array(operator, given, 3).data
        made = made.plus(np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
    found = scores.finish(converter, replace(made, softmaxed=True), value)
    if flat:
        found = views.transpose(found, (0, 2, 1, 3))
        found = views.reshape(found, (*found.shape[:2], -1 * -math.prod(found.shape[2:])))
    return found


def _heads(x: Value, heads: int) -> Value:
    batch, seq_len, width = x.shape
    return views.transpose(views.reshape(x, (batch, seq_len, heads, width // heads)), (0, 2, 1, 3))


TABLE: Mapping[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "RMSNormalization": _norm("rms"),
    "LayerNormalization": _norm("layer"),
    "ReduceMean": _mean,
    "Softmax": _softmax,
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
}
