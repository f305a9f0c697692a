"""Small ONNX models by hand: what a test of one operator or rule needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from memladder.engine.frontend import convert
from memladder.engine.graph.evaluate import evaluate
from memladder.engine.graph.nodes import Graph

Spelled = Sequence[tuple[Any, ...]]
"""Nodes: operator, inputs, output, and attributes if it has any."""


def save(
    path: Path,
    nodes: Spelled,
    constants: Mapping[str, Any] | None = None,
    *,
    shape: Sequence[int | str] = (2, 5, 8),
    output: str = "y",
    dtype: int = TensorProto.FLOAT,
) -> Path:
    """A model of input `x` and of these nodes."""
    made = [
        helper.make_node(node[0], _names(node[1]), [node[2]], name=f"{node[0].lower()}_{number}",
                         **(node[3] if len(node) > 3 else {}))
        for number, node in enumerate(nodes)
    ]  # fmt: skip
    arrays = {name: np.asarray(value) for name, value in (constants or {}).items()}
    given = helper.make_tensor_value_info("x", dtype, list(shape))
    found = helper.make_tensor_value_info(output, dtype, None)
    graph = helper.make_graph(
        made,
        "layer",
        [given],
        [found],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def _names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def imported(
    path: Path, nodes: Spelled, constants: Mapping[str, Any] | None = None, **options: Any
) -> Graph:
    """The canonical graph of these nodes."""
    return convert.load(save(path / "model.onnx", nodes, constants, **options))


def both(path: Path, graph: Graph, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the graph computes, and what ONNX's own evaluator does, for the same states: random ones
    by default."""
    from onnx.reference import ReferenceEvaluator

    size = (graph.shape.batch_size, graph.shape.seq_len, graph.input.columns)
    if states is None:
        states = torch.randn(size, generator=torch.Generator().manual_seed(0))
    evaluator = ReferenceEvaluator(str(path / "model.onnx"))
    # Its sigmoid computes both branches, its norms of zeros divide by them.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        (expected,) = evaluator.run(None, {"x": states.numpy()})
    return evaluate(graph, states), torch.from_numpy(np.array(expected))
