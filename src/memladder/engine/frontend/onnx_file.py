"""Reading an ONNX file: its operators as they are, its weights as views of the mapped files.

Nothing of the model runs, and nothing outside its folder is read. Weights are never copied: a
model's external data is memory-mapped, so that a page is read when a weight is packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memladder.core.case import Workload
from memladder.core.errors import GraphError
from memladder.engine.graph.nodes import Array

_FLOATS = ("float16", "bfloat16", "float32")
_LEAST_OPSET = 18
_DOMAINS = ("", "ai.onnx")


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

    Raises GraphError, one line, for what is no ONNX file, for missing external data, for open
    dynamic shapes, and for inputs and outputs other than hidden states.
    """
    proto = _parsed(path)
    graph = proto.graph
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
    if len(sizes) != 3:
        raise GraphError(
            f"{path}: input {inputs[0].name!r} is {sizes}; "
            "[batch_size, seq_len, hidden_size] wanted"
        )
    return Model(
        tuple(_operator(number, node) for number, node in enumerate(graph.node)),
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
        if not path.is_file():
            raise GraphError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        proto = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise GraphError(f"{path}: {error.strerror or error}") from None
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


def _operator(number: int, node: Any) -> Operator:
    from onnx import AttributeProto, helper

    name = node.name or f"node {number}"
    attributes = {}
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise GraphError(f"unsupported operator {node.op_type} {name!r}: it holds a graph")
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.TENSOR:
            value = _inline(value)
        attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    op = node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
    return Operator(op, name, tuple(node.input), tuple(node.output), attributes, node)


def _array(path: Path, tensor: Any) -> Array:
    from onnx import TensorProto

    external = tensor.data_location == TensorProto.EXTERNAL
    return Array(tensor.name, _mapped(path, tensor) if external else _inline(tensor))


def _inline(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    found: np.ndarray = numpy_helper.to_array(tensor)
    return found


def _mapped(path: Path, tensor: Any) -> np.ndarray:
    """A view of the external file. It must lie in the model's folder, and hold the tensor."""
    from onnx import helper

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = path.parent / location
    inside = where.resolve().is_relative_to(path.parent.resolve())
    if not location or not inside:
        raise GraphError(f"{path}: external data of {tensor.name!r} lies outside the folder")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    offset, needed = int(entries.get("offset", 0)), math.prod(shape) * dtype.itemsize
    if not where.is_file():
        raise GraphError(f"{path}: external data is missing: {where}")
    if offset < 0 or where.stat().st_size < offset + needed:
        raise GraphError(f"{path}: external data {where} is too short for {tensor.name!r}")
    if not needed:
        return np.zeros(shape, dtype)
    raw = np.memmap(where, np.uint8, "r", offset, (needed,))
    found: np.ndarray = raw.view(dtype).reshape(shape)
    return found
