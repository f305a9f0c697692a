"""Reading an ONNX file: its operators as they are, its weights as views of the mapped files.

Nothing of the model runs, and nothing outside its folder is read. Weights are never copied: a
model's external data is memory-mapped, so that a page is read when a weight is packed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memladder.core.case import Workload
from memladder.core.errors import GraphError
from memladder.core.files import open_regular, read_regular
from memladder.engine.frontend import onnx_check
from memladder.engine.graph.nodes import Array

_FLOATS = ("float16", "bfloat16", "float32")
_LEAST_OPSET = 18
_DOMAINS = ("", "ai.onnx")
# Protocol buffers can be no longer.
_MOST_BYTES = (1 << 31) - 1

BITS = {
    **dict.fromkeys(("BOOL", "INT8", "UINT8"), 8),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64"), 64),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 8),
    "FLOAT8E8M0": 8,
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
}
"""Bits of an element in a file, by ONNX's name of its type. Elements of less than a byte follow
each other without a gap, the first in the lowest bits (onnx.proto, TensorProto.raw_data). Strings
and complex numbers are no part of a layer."""


@dataclass(frozen=True)
class Operator:
    """One ONNX node; an input that is left out is an empty name."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: Any

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


@dataclass(frozen=True)
class Model:
    """A model of one input [batch_size, seq_len, hidden_size] and one output."""

    operators: tuple[Operator, ...]
    constants: Mapping[str, Array]
    input: str
    output: str
    shape: Workload
    hidden_size: int
    opset: int


def read(path: Path, given: Mapping[str, np.ndarray] | None = None) -> Model:
    """The model in a file. Parameters that are `given` are taken from there.

    Raises GraphError, one line, for a file that is no ONNX, for missing external data, for open
    dynamic shapes, and for inputs and outputs other than hidden states.
    """
    proto = _parsed(path)
    graph = proto.graph
    stored = {t.name for t in graph.initializer}
    if len(stored) != len(graph.initializer) or graph.sparse_initializer:
        raise GraphError(f"{path}: two constants of one name, or sparse ones")
    opset = max((o.version for o in proto.opset_import if o.domain in _DOMAINS), default=0)
    if opset < _LEAST_OPSET:
        raise GraphError(f"{path}: opset {opset}; {_LEAST_OPSET} or later is wanted")
    constants = {
        t.name: Array(t.name, given[t.name]) if given and t.name in given else _array(path, t)
        for t in graph.initializer
    }
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = ", ".join(value.name for value in (inputs, graph.output)[len(inputs) == 1])
        what = "input" if len(inputs) != 1 else "output"
        raise GraphError(f"{path}: one {what} is wanted, the hidden states; it has: {names[:200]}")
    sizes = _sizes(path, inputs[0])
    onnx_check.check(path, proto, given or {})
    operators, made = _operators(path, graph.node)
    constants |= made
    if len(sizes) != 3:
        raise GraphError(
            f"{path}: input {inputs[0].name!r} is {sizes}; "
            "[batch_size, seq_len, hidden_size] wanted"
        )
    return Model(
        operators,
        constants,
        inputs[0].name,
        graph.output[0].name,
        Workload(sizes[0], sizes[1]),
        sizes[2],
        opset,
    )


def _parsed(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.ModelProto.FromString(read_regular(path, _MOST_BYTES, GraphError))
    except DecodeError:
        raise GraphError(f"{path}: not an ONNX file") from None
    if not proto.ir_version or not proto.graph.node:
        raise GraphError(f"{path}: not an ONNX file, or one without operators")
    if proto.functions:
        from onnx.inliner import inline_local_functions

        proto = inline_local_functions(proto)
    return proto


def _sizes(path: Path, value: Any) -> list[int]:
    from onnx import TensorProto

    kind = value.type.tensor_type
    dtype = TensorProto.DataType.Name(kind.elem_type).lower()
    if dtype.removesuffix("16").removesuffix("32") not in ("float", "bfloat"):
        raise GraphError(f"{path}: input {value.name!r} is {dtype}; {', '.join(_FLOATS)} are known")
    for axis, size in enumerate(kind.shape.dim):
        if size.WhichOneof("value") != "dim_value" or size.dim_value < 1:
            raise GraphError(
                f"{path}: axis {axis} of input {value.name!r} is dynamic"
                + (f" ({size.dim_param})" if size.dim_param else "")
                + "; export the layer at the shape that it is to be compiled for"
            )
    return [size.dim_value for size in kind.shape.dim]


def _operators(path: Path, nodes: Any) -> tuple[tuple[Operator, ...], dict[str, Array]]:
    """The operators, and what those give that are constants themselves."""
    operators, constants = [], {}
    for number, node in enumerate(nodes):
        if node.op_type == "Constant" and node.domain in _DOMAINS and len(node.output) == 1:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                name = node.output[0]
                constants[name] = Array(name, _numbers(path, value, name))
                continue
        operators.append(_operator(path, number, node))
    return tuple(operators), constants


def _operator(path: Path, number: int, node: Any) -> Operator:
    from onnx import AttributeProto, helper

    name = node.name or f"node {number}"
    attributes = {}
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise GraphError(f"unsupported operator {node.op_type} {name!r}: it holds a graph")
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.TENSOR:
            value = _numbers(path, value, name)
        attributes[attribute.name] = _text(value) if isinstance(value, bytes) else value
    op = node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
    return Operator(op, name, tuple(node.input), tuple(node.output), attributes, node)


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _array(path: Path, tensor: Any) -> Array:
    return Array(tensor.name, _numbers(path, tensor, tensor.name))


def _numbers(path: Path, tensor: Any, name: str) -> np.ndarray:
    """A tensor of the file, or of one beside it."""
    from onnx import TensorProto

    known = {number: key for key, number in TensorProto.DataType.items()}
    kind = known.get(tensor.data_type, f"of type {tensor.data_type}")
    if kind not in BITS:
        raise GraphError(f"{path}: constant {name!r} is {kind.lower()}, which is not supported")
    shape = tuple(tensor.dims)
    if min(shape, default=0) < 0:
        raise GraphError(f"{path}: constant {name!r} has the shape {list(shape)}")
    needed = -(-math.prod(shape) * BITS[kind] // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _mapped(path, tensor, name, BITS[kind], needed)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        held = len(tensor.raw_data)
        raise GraphError(f"{path}: constant {name!r} has {held} bytes; {needed} wanted")
    try:
        return _inline(tensor)
    except (ValueError, TypeError, OverflowError):
        raise GraphError(
            f"{path}: constant {name!r} does not hold {list(shape)} numbers of type {kind.lower()}"
        ) from None


def _inline(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    found: np.ndarray = numpy_helper.to_array(tensor)
    return found


def _mapped(path: Path, tensor: Any, name: str, bits: int, needed: int) -> np.ndarray:
    """A view of the external file. It must lie in the model's folder, and hold the tensor."""
    from onnx import TensorProto, helper

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location.isprintable():
        raise GraphError(f"{path}: external data of {name!r} is in a file {location[:80]!r}")
    where = path.parent / location
    try:
        inside = bool(location) and where.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError) as error:
        raise GraphError(f"{path}: external data of {name!r}: {error}") from None
    if not inside:
        raise GraphError(f"{path}: external data of {name!r} lies outside the folder")
    offset = _entry(path, entries, "offset", name, 0)
    if _entry(path, entries, "length", name, needed) != needed:
        raise GraphError(
            f"{path}: external data of {name!r} has length {entries['length']}; {needed} wanted"
        )
    with open_regular(where, None, _ExternalError) as file:
        if os.fstat(file.fileno()).st_size < offset + needed:
            raise GraphError(f"{path}: external data {where} is too short for {name!r}")
        dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        if not needed:
            return np.zeros(shape, dtype)
        raw = np.memmap(file, np.uint8, "r", offset, (needed,))
    if bits < 8:
        packed = TensorProto(data_type=tensor.data_type, dims=shape, raw_data=raw.tobytes())
        return _inline(packed)
    found: np.ndarray = raw.view(dtype).reshape(shape)
    return found


class _ExternalError(GraphError):
    """A file of external data that can't be opened."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"external data is missing: {reason}")


def _entry(path: Path, entries: Mapping[str, str], key: str, name: str, default: int) -> int:
    """A whole number of a reference into a file."""
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise GraphError(
            f"{path}: external data of {name!r} has {key} {text[:40]!r}; a number of bytes wanted"
        )
    return int(text)
