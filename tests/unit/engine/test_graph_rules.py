"""Rules and operators, each on a few nodes, against ONNX's own evaluator."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from memladder.engine.graph.nodes import Linear, Norm, Pointwise
from tests.unit.onnx_models import Spelled, both, imported

ROOT = float(np.sqrt(2 / np.pi))
NUMBERS = {
    "half": 0.5, "one": 1.0, "three": 3.0, "two": 2.0, "c": 0.044715, "root": ROOT,
    "sqrt2": math.sqrt(2), "quick": 1.702, "eps": 1e-5,
}  # fmt: skip
CONSTANTS = {name: np.float32(value) for name, value in NUMBERS.items()}
AXES = {"last": np.array([-1], np.int64)}

# (name, how it is spelled, what it is).
FUNCTIONS: list[tuple[str, Spelled]] = [
    ("silu", [("Sigmoid", "x", "s"), ("Mul", ("x", "s"), "y")]),
    ("silu", [("Neg", "x", "n"), ("Exp", "n", "e"), ("Add", ("e", "one"), "d"),
              ("Div", ("x", "d"), "y")]),
    ("gelu", [("Div", ("x", "sqrt2"), "d"), ("Erf", "d", "e"), ("Add", ("e", "one"), "p"),
              ("Mul", ("x", "p"), "m"), ("Mul", ("m", "half"), "y")]),
    # As GPT-2 spells it.
    ("gelu_tanh", [("Pow", ("x", "three"), "p"), ("Mul", ("p", "c"), "m"), ("Add", ("x", "m"), "a"),
                   ("Mul", ("a", "root"), "r"), ("Tanh", "r", "t"), ("Add", ("t", "one"), "o"),
                   ("Mul", ("x", "half"), "h"), ("Mul", ("h", "o"), "y")]),
    # As BLOOM spells it.
    ("gelu_tanh", [("Mul", ("x", "half"), "h"), ("Mul", ("x", "root"), "r"),
                   ("Mul", ("x", "c"), "m"), ("Mul", ("m", "x"), "q"), ("Add", ("q", "one"), "a"),
                   ("Mul", ("r", "a"), "z"), ("Tanh", "z", "t"), ("Add", ("t", "one"), "o"),
                   ("Mul", ("h", "o"), "y")]),
    ("quick_gelu", [("Mul", ("x", "quick"), "q"), ("Sigmoid", "q", "s"), ("Mul", ("x", "s"), "y")]),
    ("relu_squared", [("Relu", "x", "r"), ("Mul", ("r", "r"), "y")]),
    ("relu_squared", [("Relu", "x", "r"), ("Pow", ("r", "two"), "y")]),
    ("gelu", [("Gelu", "x", "y")]),
    ("gelu_tanh", [("Gelu", "x", "y", {"approximate": "tanh"})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nodes"), FUNCTIONS)
def test_a_function_is_what_it_computes(name: str, nodes: Spelled, tmp_path: Path) -> None:
    graph = imported(tmp_path, nodes, CONSTANTS)
    assert isinstance(graph.output, Pointwise)
    assert (graph.output.function, graph.output.operands) == (name, (graph.input,))
    torch.testing.assert_close(*both(tmp_path, graph), rtol=1e-5, atol=1e-6)


def test_numbers_of_a_float16_model_are_rounded(tmp_path: Path) -> None:
    rounded = {name: np.float32(np.float16(value)) for name, value in NUMBERS.items()}
    for name, nodes in FUNCTIONS[:6]:
        graph = imported(tmp_path, nodes, rounded)
        assert isinstance(graph.output, Pointwise)
        assert graph.output.function == name


def test_a_function_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    graph = imported(tmp_path, [("Tanh", "x", "t"), ("Mul", ("t", "x"), "y")], {})
    assert isinstance(graph.output, Pointwise)
    assert graph.output.function == "mul"
    torch.testing.assert_close(*both(tmp_path, graph))


_MEAN: Spelled = [("Mul", ("x", "x"), "q"), ("ReduceMean", ("q", "last"), "m")]
RMS: list[Spelled] = [
    [*_MEAN, ("Add", ("m", "eps"), "a"), ("Sqrt", "a", "r"), ("Div", ("x", "r"), "y")],
    [*_MEAN, ("Add", ("eps", "m"), "a"), ("Sqrt", "a", "r"), ("Reciprocal", "r", "i"),
     ("Mul", ("x", "i"), "y")],
    [("Pow", ("x", "two"), "q"), ("ReduceMean", ("q", "last"), "m"), ("Add", ("m", "eps"), "a"),
     ("Sqrt", "a", "r"), ("Div", ("one", "r"), "i"), ("Mul", ("i", "x"), "y")],
]  # fmt: skip


@pytest.mark.parametrize("nodes", RMS)
def test_a_root_mean_square_norm_is_what_it_computes(nodes: Spelled, tmp_path: Path) -> None:
    graph = imported(tmp_path, nodes, CONSTANTS | AXES)
    assert isinstance(graph.output, Norm)
    assert (graph.output.kind, graph.output.group) == ("rms", 8)
    assert graph.output.eps == pytest.approx(1e-5)
    torch.testing.assert_close(*both(tmp_path, graph))


_CENTRED: Spelled = [("ReduceMean", ("x", "last"), "u"), ("Sub", ("x", "u"), "d")]


def test_a_layer_norm_by_hand_with_its_weight_and_bias(tmp_path: Path) -> None:
    weight, bias = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    nodes: Spelled = [
        *_CENTRED, ("Mul", ("d", "d"), "q"), ("ReduceMean", ("q", "last"), "v"),
        ("Add", ("v", "eps"), "a"), ("Sqrt", "a", "r"), ("Div", ("d", "r"), "n"),
        ("Mul", ("n", "w"), "s"), ("Add", ("s", "b"), "y"),
    ]  # fmt: skip
    graph = imported(tmp_path, nodes, {**CONSTANTS, **AXES, "w": weight, "b": bias})
    assert isinstance(graph.output, Norm)
    assert graph.output.kind == "layer"
    np.testing.assert_array_equal(graph.output.weight, weight)
    np.testing.assert_array_equal(graph.output.bias, bias)
    torch.testing.assert_close(*both(tmp_path, graph))


def test_a_norm_of_what_is_centred_is_a_layer_norm(tmp_path: Path) -> None:
    weight = np.arange(1, 9, dtype=np.float32)
    nodes: Spelled = [*_CENTRED, ("RMSNormalization", ("d", "w"), "y", {"epsilon": 1e-3})]
    graph = imported(tmp_path, nodes, {**AXES, "w": weight})
    assert isinstance(graph.output, Norm)
    assert (graph.output.kind, graph.output.eps) == ("layer", 1e-3)
    torch.testing.assert_close(*both(tmp_path, graph))


def test_linear_layers_in_all_spellings_are_one_node(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    constants = {
        "w": matrix.T.copy(), "wt": matrix, "b": np.arange(8, dtype=np.float32),
        "flat": np.array([-1, 8]), "back": np.array([2, 5, 8]), "two": np.float32(2),
    }  # fmt: skip
    spelled: list[Spelled] = [
        [("MatMul", ("x", "w"), "m"), ("Add", ("m", "b"), "y")],
        [("Transpose", "wt", "t", {"perm": [1, 0]}), ("MatMul", ("x", "t"), "m"),
         ("Add", ("b", "m"), "y")],
        [("Reshape", ("x", "flat"), "f"), ("Gemm", ("f", "wt", "b"), "g", {"transB": 1}),
         ("Reshape", ("g", "back"), "y")],
        [("Reshape", ("x", "flat"), "f"),
         ("Gemm", ("f", "w", "b"), "g", {"alpha": 2.0, "beta": 0.5}),
         ("Reshape", ("g", "back"), "y")],
        [("MatMul", ("x", "w"), "m"), ("Add", ("m", "b"), "a"), ("Mul", ("a", "two"), "y")],
    ]  # fmt: skip
    for nodes in spelled:
        graph = imported(tmp_path, nodes, constants)
        assert isinstance(graph.output, Linear)
        assert graph.output.bias is not None
        assert len(list(graph.nodes())) == 2
        torch.testing.assert_close(*both(tmp_path, graph), rtol=1e-5, atol=1e-5)


def test_a_choice_of_a_layers_columns_is_a_choice_of_its_rows(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    nodes: Spelled = [
        ("MatMul", ("x", "w"), "m"),
        ("Slice", ("m", "start", "stop", "last", "step"), "y"),
    ]
    constants = {
        "w": matrix, "start": np.array([1]), "stop": np.array([16]), "step": np.array([2]), **AXES,
    }  # fmt: skip
    graph = imported(tmp_path, nodes, constants)
    assert isinstance(graph.output, Linear)
    assert graph.output.weight.rows.tolist() == list(range(1, 16, 2))
    torch.testing.assert_close(*both(tmp_path, graph))
