"""Products, norms and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.frontend import scores, views
from memladder.engine.frontend.axes import LayoutError
from memladder.engine.frontend.convert import Converter
from memladder.engine.frontend.onnx_file import Operator
from memladder.engine.frontend.operators.elements import both, plus
from memladder.engine.frontend.operators.operands import Result, Rule, as_array, as_value, reduced
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
    mixed = any(isinstance(f, int) for axis in x.axes[:-1] for f in axis if f != 1)
    if x.shape[-1:] != (columns,) or mixed or any(isinstance(f, str) for f in x.axes[-1]):
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


def _by_column(x: Value, array: Any) -> np.ndarray:
    if not isinstance(array, Array):
        raise LayoutError("a norm whose weight or bias depends on the hidden states")
    numbers = views.table(x, np.asarray(array.data, np.float32))
    if (numbers != numbers[:1]).any():
        raise LayoutError("a norm whose weight or bias differs between tokens")
    return np.ascontiguousarray(np.broadcast_to(numbers[0], x.columns)).reshape(-1)


def _mean(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0]).merged()
    axes = reduced(operator, given, len(x.axes))
    if axes is None:
        return x
    # Axes of size 1 are their own mean.
    means = [axis for axis in sorted(axes) if x.shape[axis] > 1]
    after = [axis for axis in range(min(means, default=0), len(x.axes)) if x.shape[axis] > 1]
    if means != (after if means else []) or any(
        isinstance(f, str) for axis in means for f in x.axes[axis]
    ):
        raise LayoutError("a mean of something else than columns, the last axes")
    node, group = converter.flat(x), math.prod(x.shape[axis] for axis in means)
    made = converter.nodes(Mean(node.columns // group, operator.name, node, group))
    keep = bool(operator.attributes.get("keepdims", 1))
    left = [() if i in means else axis for i, axis in enumerate(x.axes) if keep or i not in axes]
    return converter.whole(made, tuple(left))


def _sum(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    found = _mean(converter, operator, given)
    assert isinstance(found, Value)
    before, after = (math.prod(x.shape) for x in (as_value(given[0]), found))
    return views.scaled(found, before // after)


def _softmax(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    if not isinstance(given[0], Scores):
        raise LayoutError("a softmax of something else than attention's scores")
    return given[0].normalised(operator.attributes.get("axis", -1))


def _is_nan(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    """A guard of rows that see no key: masks that hide a token from itself are refused."""
    if not isinstance(given[0], Scores) or not given[0].softmaxed:
        raise LayoutError("a check of something else than attention's probabilities")
    return Array(operator.name, np.zeros((1,) * len(given[0].axes), bool))


def _rotary(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    x = as_value(given[0])
    shape, attributes = x.shape, operator.attributes
    cos, sin = (np.asarray(as_array(operator, given, i).data, np.float32) for i in (1, 2))
    if len(given) > 3 and given[3] is not None:
        cos, sin = (part[as_array(operator, given, 3).data] for part in (cos, sin))
    if len(shape) == 3:
        x = _split(x, attributes.get("num_heads", 0))
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


# What other attributes say does not change the output, or not what is known of it.
_ATTENTION = frozenset(
    (
        *("q_num_heads", "kv_num_heads", "scale", "softcap", "is_causal"),
        *("softmax_precision", "qk_matmul_output_mode"),
    )
)


def _attention(converter: Converter, operator: Operator, given: Sequence[Any]) -> Result:
    attributes = operator.attributes
    unknown = sorted(attributes.keys() - _ATTENTION)
    if unknown:
        raise LayoutError(f"an attention with {unknown[0]}")
    query, key, value = (as_value(operand) for operand in given[:3])
    if len(given) > 4 and any(operand is not None for operand in given[4:]):
        raise LayoutError("keys and values of earlier tokens")
    flat = len(query.shape) == 3
    if flat:
        query = _heads(query, attributes.get("q_num_heads", 0))
        key, value = (_heads(x, attributes.get("kv_num_heads", 0)) for x in (key, value))
    if len(query.shape) != 4 or len(key.shape) != 4 or len(value.shape) != 4:
        raise LayoutError(f"queries, keys and values of {query.shape}, {key.shape}, {value.shape}")
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
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
    return views.transpose(_split(x, heads), (0, 2, 1, 3))


def _repeated(x: Value, heads: int) -> Value:
    """[batch_size, kv_heads, seq_len, head_dim]: each of its heads for as many of the queries'."""
    batch_size, kv_heads, *rest = x.shape
    if heads % kv_heads:
        raise LayoutError(f"{heads} heads of queries, {kv_heads} of keys or values")
    x = views.reshape(x, (batch_size, kv_heads, 1, *rest))
    x = views.expand(x, (batch_size, kv_heads, heads // kv_heads, *rest))
    return views.reshape(x, (batch_size, heads, *rest))


def _split(x: Value, heads: int) -> Value:
    """[batch_size, seq_len, heads · head_dim] by heads."""
    if len(x.shape) != 3 or heads < 1 or x.shape[2] % heads:
        raise LayoutError(f"{heads} heads of activations of shape {x.shape}")
    return views.reshape(x, (*x.shape[:2], heads, x.shape[2] // heads))


TABLE: Mapping[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "RMSNormalization": _norm("rms"),
    "LayerNormalization": _norm("layer"),
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "IsNaN": _is_nan,
    "Softmax": _softmax,
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
}
