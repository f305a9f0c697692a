"""What clips, anywhere in float16's range, is no function without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memladder.engine.graph.nodes import Norm, Pointwise
from tests.unit.onnx_models import Spelled, both, imported

NUMBERS = {
    **{"one": 1.0, "two": 2.0, "c1000": 1000.0, "n30": -30.0, "n10": -10.0, "n1e_4": -1e-4},
    **{"c3": 3.0, "c10": 10.0, "c20": 20.0, "c40": 40.0, "c60000": 60000.0, "c1e_3": 1e-3},
    **{"tiny": 1e-12, "root": 10.0, "cube": 1e-9, "eps": 1e-5, "width": 32.0, "c099": 0.999},
}
CONSTANTS = {name: np.float32(value) for name, value in NUMBERS.items()}
CONSTANTS |= {"last": np.array([-1]), "none": np.array([], np.int64)}

_SILU: Spelled = [("Sigmoid", "x", "s"), ("Mul", ("x", "s"), "f")]
CLIPPED: list[Spelled] = [
    [("Gelu", "x", "f"), ("Clip", ("f", "n10", "c10"), "y")],
    [("Gelu", "x", "f", {"approximate": "tanh"}), ("Max", ("f", "n1e_4"), "y")],
    [("Min", ("x", "c10"), "c"), ("Sigmoid", "c", "s"), ("Mul", ("c", "s"), "y")],
    [("Max", ("x", "n30"), "c"), ("Sigmoid", "c", "s"), ("Mul", ("x", "s"), "y")],
    [("Relu", "x", "f"), ("Min", ("f", "c20"), "y")],
    [("Relu", "x", "f"), ("Min", ("c60000", "f"), "y")],
    [("Relu", "x", "f"), ("Mul", ("f", "f"), "q"), ("Clip", ("q", "", "c60000"), "y")],
    [("Clip", ("x", "", "c40"), "c"), ("Relu", "c", "f"), ("Pow", ("f", "two"), "y")],
    # A soft cap; a cube; a bump far away: relu(x) − 2 relu(x − 1000) + relu(x − 2000).
    [*_SILU, ("Div", ("f", "c1000"), "d"), ("Tanh", "d", "t"), ("Mul", ("t", "c1000"), "y")],
    [*_SILU, ("Pow", ("x", "c3"), "p"), ("Mul", ("p", "cube"), "m"), ("Add", ("f", "m"), "y")],
    [("Relu", "x", "f"), ("Sub", ("x", "c1000"), "a"), ("Relu", "a", "b"), ("Sub", ("a", "c1000"),
     "c"), ("Relu", "c", "d"), ("Mul", ("b", "two"), "e"), ("Sub", ("f", "e"), "g"),
     ("Add", ("g", "d"), "y")],
    [("Sigmoid", "x", "f"), ("Min", ("f", "c099"), "y")],
    [("Tanh", "x", "f"), ("Clip", ("f", "", "c099"), "y")],
    [("Clip", ("x", "n10", "c1000"), "y")],
]  # fmt: skip

_SQUARE: Spelled = [("Mul", ("x", "x"), "q"), ("ReduceMean", ("q", "last"), "m")]
_ADDED: Spelled = [*_SQUARE, ("Add", ("m", "eps"), "a"), ("Sqrt", "a", "r")]
CLIPPED_NORMS: list[Spelled] = [
    [*_SQUARE, ("Max", ("m", "c1e_3"), "a"), ("Sqrt", "a", "r"), ("Div", ("x", "r"), "y")],
    [*_SQUARE, ("Min", ("m", "c60000"), "v"), ("Add", ("v", "eps"), "a"), ("Sqrt", "a", "r"),
     ("Div", ("x", "r"), "y")],
    [*_SQUARE, ("Sqrt", "m", "s"), ("Add", ("s", "c1e_3"), "r"), ("Div", ("x", "r"), "y")],
    [*_ADDED, ("Div", ("x", "r"), "n"), ("Clip", ("n", "n10", "c3"), "y")],
    [*_ADDED, ("Div", ("x", "r"), "n"), ("Max", ("n", "n30"), "c"), ("Min", ("c", "two"), "y")],
    [("Clip", ("x", "", "c60000"), "z"), ("Mul", ("z", "z"), "q"), ("ReduceMean", ("q", "last"),
     "m"), ("Add", ("m", "eps"), "a"), ("Sqrt", "a", "r"), ("Div", ("x", "r"), "y")],
    [("ReduceMean", ("x", "last"), "u"), ("Sub", ("x", "u"), "d"), ("Min", ("d", "c1000"), "y")],
]  # fmt: skip


def far() -> Tensor:
    """[2, 5, 32]: rows of all magnitudes that float16 has, and one with a number alone."""
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(-5, 5, 10).view(2, 5, 1)
    states = (torch.randn(2, 5, 32, generator=generator) * size).clamp(-65504, 65504)
    states[0, 0] = 0
    states[0, 0, 0] = 500
    return states


@pytest.mark.parametrize("nodes", [*CLIPPED, *CLIPPED_NORMS])
def test_a_clip_is_kept_wherever_it_acts(nodes: Spelled, tmp_path: Path) -> None:
    graph = imported(tmp_path, nodes, CONSTANTS, shape=(2, 5, 32))
    found, expected = both(tmp_path, graph, far())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_clip_that_acts_nowhere_is_none(tmp_path: Path) -> None:
    constants = CONSTANTS | {"most": np.float32(65504)}
    for nodes, name in (
        ([("Relu", "x", "f"), ("Min", ("f", "most"), "y")], "relu"),
        ([*_SILU, ("Max", ("f", "n10"), "y")], "silu"),
    ):
        graph = imported(tmp_path, nodes, constants)
        assert isinstance(graph.output, Pointwise)
        assert (graph.output.function, graph.output.operands) == (name, (graph.input,))


def test_a_least_norm_that_float16_does_not_reach_is_an_epsilon(tmp_path: Path) -> None:
    nodes = [*_SQUARE, ("Sqrt", "m", "s"), ("Max", ("s", "tiny"), "r"), ("Div", ("x", "r"), "y")]
    graph = imported(tmp_path, nodes, CONSTANTS, shape=(2, 5, 32))
    assert isinstance(graph.output, Norm)
    states = far()
    # Zeros are no number without an epsilon.
    states[1, 1] = 0
    torch.testing.assert_close(*both(tmp_path, graph, states), rtol=1e-5, atol=1e-6)
