"""Whether an ONNX graph is one: operators as ONNX's own schemas have them, types and shapes that
fit each other, each name given once and before it is read. What comes after may rely on that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memladder.core.errors import GraphError

# Constants that shapes may be computed of; of larger ones only type and shape are looked at.
_MOST_BYTES = 1 << 13
# An operator takes some 10 KiB and 1 ms while it is compiled; a decoder layer has hundreds.
_MOST_OPERATORS = 20_000


def check(path: Path, proto: Any, replaced: Mapping[str, np.ndarray]) -> None:
    """Raise GraphError, one line that names the node, for a graph that breaks ONNX's rules.

    `replaced`: constants that are taken from elsewhere, in another type perhaps.
    """
    graph = proto.graph
    if len(graph.node) > _MOST_OPERATORS:
        raise GraphError(f"{path}: {len(graph.node):,} operators; {_MOST_OPERATORS:,} are the most")
    _check_names(path, graph)
    for number, node in enumerate(graph.node):
        _check_node(path, proto, node, f"{node.op_type} {node.name or f'node {number}'!r}")
    _check_types(path, proto, replaced)


def _check_names(path: Path, graph: Any) -> None:
    known = {value.name for value in (*graph.input, *graph.initializer)}
    for number, node in enumerate(graph.node):
        what = f"operator {node.op_type} {node.name or f'node {number}'!r}"
        unknown = next((name for name in node.input if name and name not in known), None)
        if unknown is not None:
            raise GraphError(f"{path}: {what} reads {unknown!r}, which nothing before it computes")
        for name in filter(None, node.output):
            if name in known:
                raise GraphError(f"{path}: {what} gives {name!r} a second time")
            known.add(name)


def _check_node(path: Path, proto: Any, node: Any, what: str) -> None:
    from onnx import checker

    context = checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in proto.opset_import}
    try:
        checker.check_node(node, context)
    except checker.ValidationError as error:
        raise GraphError(f"{path}: operator {what}: {_line(error)}") from None


def _check_types(path: Path, proto: Any, replaced: Mapping[str, np.ndarray]) -> None:
    """Types and shapes of all values, by ONNX's own rules of what operators make of them."""
    import onnx
    from onnx import ModelProto, TensorProto, helper, shape_inference

    light = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    light.graph.name = "layer"
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    # The output has the hidden states' type and shape again: that is looked at later.
    light.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in proto.graph.output)
    given = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        external = tensor.data_location == TensorProto.EXTERNAL
        own, dtype = replaced.get(tensor.name), tensor.data_type
        if own is not None:
            dtype = helper.np_dtype_to_tensor_dtype(own.dtype)
        if own is None and not external and tensor.ByteSize() <= _MOST_BYTES:
            light.graph.initializer.append(tensor)
        elif tensor.name not in given:
            info = helper.make_tensor_value_info(tensor.name, dtype, tensor.dims)
            light.graph.input.append(info)
    try:
        shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except (shape_inference.InferenceError, ValueError, TypeError, RuntimeError) as error:
        raise GraphError(f"{path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    """A library's text without its addresses and its line breaks."""
    text = re.sub(r"\[(ShapeInferenceError|TypeInferenceError)\]|==> Context:.*", "", str(error))
    return " ".join(text.split())[:300]
