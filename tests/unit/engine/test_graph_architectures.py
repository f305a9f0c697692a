"""Decoder layers of many architectures, from Hugging Face by way of ONNX to the canonical graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from memladder.core.errors import GraphError
from memladder.engine.frontend import convert
from memladder.engine.graph.evaluate import evaluate
from memladder.engine.graph.nodes import Attention, Graph, Norm, Pointwise, Rotary
from tests import hf_layers

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

# Spelled by the layer, or by PyTorch's attention: both for the main ones.
_BOTH = ("llama", "gpt_neox", "opt", "mistral", "qwen2", "gemma", "qwen3", "olmo2")
CASES = [
    *hf_layers.parameters(sorted(hf_layers.LAYERS.keys() - hf_layers.UNSUPPORTED), ""),
    *hf_layers.parameters(_BOTH, "eager"),
]


def imported(name: str, *shape_and_attention: Any) -> float:
    """Relative error of the canonical graph, in float32."""
    layer = hf_layers.exported(name, *shape_and_attention)
    found = evaluate(convert.load(layer.path), layer.given)
    return hf_layers.relative_error(found, layer.expected())


def graph(name: str) -> Graph:
    return convert.load(hf_layers.exported(name).path)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_canonical_graph_is_the_layer(name: str, attention: str) -> None:
    assert imported(name, 2, 13, attention) <= 2e-6


# The exporter's default; it spells attention and norms out before 23.
_OPSETS = (20, 18, 19, 21, 22, 24, 25)
# Norms of heads that are rotated then; guards of masked rows; values that are normed after all.
_SPELLED_OUT = ("qwen3", "mistral", "exaone4")


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        param
        for opset in _OPSETS
        for param in hf_layers.parameters(
            sorted(hf_layers.LAYERS.keys() - hf_layers.UNSUPPORTED),
            opset,
            sample=_SPELLED_OUT if opset == 20 else ("none",),
        )
    ],
)
def test_the_canonical_graph_is_the_layer_in_every_opset(name: str, opset: int) -> None:
    assert imported(name, 2, 13, "", opset) <= 2e-6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("apertus", "unsupported operator Greater 'node_gt'"),
        ("diffllama", "unsupported operator Tile 'node_repeat'"),
    ],
)
def test_what_is_not_supported_is_named(name: str, said: str) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        graph(name)
    assert len(str(caught.value).splitlines()) == 1


# XGLM multiplies queries [1, heads, …] with keys [heads, …] where there is one sequence.
@pytest.mark.parametrize("name", ["llama", "bloom", "falcon", "xglm"])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (5, 1), (1, 2), (1, 200)])
def test_shapes(name: str, batch_size: int, seq_len: int) -> None:
    assert imported(name, batch_size, seq_len, "eager") <= 2e-6


def test_what_is_left_of_a_layer_is_one_node_for_each_thing_it_does() -> None:
    kinds = Counter(type(node).__name__ for node in graph("llama").nodes())
    assert kinds == {
        **{"Input": 1, "Norm": 2, "Linear": 7, "Rotary": 2, "Attention": 1},
        # silu, its product with up, two residuals.
        "Pointwise": 4,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "silu"),
        ("bloom", "gelu_tanh"),
        ("gpt2", "gelu_tanh"),
        ("gpt_neox", "gelu"),
        ("opt", "relu"),
        ("gemma", "gelu_tanh"),
        ("nemotron", "relu_squared"),
    ],
)
def test_activations_are_recognised(name: str, expected: str) -> None:
    found = [n.function for n in graph(name).nodes() if isinstance(n, Pointwise)]
    assert [function for function in found if function not in ("add", "mul")] == [expected]


@pytest.mark.parametrize(
    ("name", "heads", "window", "softcap"),
    [
        ("llama", (4, 2), None, None),
        ("falcon", (4, 1), None, None),
        ("falcon_grouped", (4, 2), None, None),
        ("mistral", (4, 2), 8, None),
        ("mistral_full", (4, 2), None, None),
        ("gemma2", (4, 2), 8, 50.0),
        ("gpt2", (4, 4), None, None),
    ],
)
def test_attention_is_recognised(
    name: str, heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    (found,) = (n for n in graph(name).nodes() if isinstance(n, Attention))
    assert (found.heads, found.kv_heads) == heads
    assert (found.window, found.softcap) == (window, softcap)
    assert found.slopes is None


def test_alibi_is_its_papers_slopes() -> None:
    (found,) = (n for n in graph("bloom_6").nodes() if isinstance(n, Attention))
    assert found.slopes is not None
    # Press et al. 2022, section 3: 4 heads, then every second of 8.
    assert found.slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize(("name", "rotated"), [("llama", 16), ("phi", 8), ("gptj", 8)])
def test_rotary_positions_are_frequencies(name: str, rotated: int) -> None:
    found = [n for n in graph(name).nodes() if isinstance(n, Rotary)]
    assert len(found) == 2
    for node in found:
        assert node.head_dim == 16
        expected = [10000.0 ** (-2 * i / rotated) for i in range(rotated // 2)]
        assert node.frequencies.tolist() == pytest.approx(
            expected + [0.0] * (8 - rotated // 2), rel=1e-6
        )


def test_norms_of_heads_and_their_offsets() -> None:
    norms = [n for n in graph("qwen3").nodes() if isinstance(n, Norm)]
    assert sorted(n.group for n in norms) == [16, 16, 64, 64]
    (cohere,) = (n for n in graph("cohere").nodes() if isinstance(n, Norm))
    assert cohere.kind == "layer"
    assert cohere.bias is None
