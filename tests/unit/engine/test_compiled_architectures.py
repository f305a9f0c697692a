"""Decoder layers of many architectures compiled from ONNX, run by the naive kernels."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from memladder import formats
from memladder.engine.compile import bundle
from memladder.engine.compile.compile import CompileOptions, compile_file
from memladder.engine.graph.evaluate import evaluate
from memladder.engine.graph.nodes import Array
from memladder.engine.packed import packed_layer
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.kernels import naive
from tests import hf_layers
from tests.unit.onnx_models import save

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

# Launches of the layer at one chunk: what its structure needs.
LAUNCHES = {
    **{"llama": 7, "bloom": 7, "bloom_6": 7, "opt": 7, "qwen2": 7, "gemma": 7, "mistral_full": 7},
    **{"gpt_neox": 7, "falcon": 6, "falcon_grouped": 7, "falcon_alibi": 7, "phi": 6, "phi3": 7},
    **{"gpt2": 7, "gptj": 6, "mpt": 7, "cohere": 6, "granite": 7, "helium": 7, "stablelm": 7},
    # A square after the rectifier; norms of heads; norms after attention and MLP.
    **{"nemotron": 8, "qwen3": 11, "olmo2": 13, "olmo3": 13, "exaone4": 13},
    # Windows of 8 tokens; a soft cap; norms before and after.
    **{"mistral": 7, "gemma2": 11, "gemma3": 15},
    **{"codegen": 6, "xglm": 7, "glm": 7, "glm4": 11, "gpt_bigcode": 7, "hunyuan": 11},
}


def run(
    path: Path,
    states: Tensor,
    folder: Path,
    options: CompileOptions,
    kernels: ModuleType = naive,
    device: str = "cpu",
) -> tuple[Tensor, int]:
    """The compiled layer's output, and how many launches it takes."""
    found = compile_file(path, options)
    bundle.pack(found, folder / bundle.WEIGHTS)
    (folder / bundle.PROGRAM).write_text(bundle.program_json(found))
    loaded = bundle.load(folder / bundle.PROGRAM, folder / bundle.WEIGHTS)
    assert (loaded.program, loaded.plan) == (found.program, found.plan)
    size = arena_bytes(loaded.program, loaded.plan, kernels)
    # NaN, so that nothing is read before it was written.
    arena = torch.full((size,), 255, dtype=torch.uint8, device=device)
    weights = loaded.weights
    block = torch.empty(packed_layer.device_bytes(weights), dtype=torch.uint8, device=device)
    weights = packed_layer.on_device(weights, block)
    execution = Execution(loaded.program, loaded.plan, weights, kernels, arena)
    execution.input.copy_(states.half().flatten(0, 1))
    execution.run()
    return execution.output.cpu().view(states.shape).float(), len(found.program.steps)


@pytest.mark.parametrize("name", hf_layers.parameters(LAUNCHES))
def test_the_compiled_layer_is_the_layer(name: str, tmp_path: Path) -> None:
    layer = hf_layers.exported(name)
    found, launches = run(layer.path, layer.given, tmp_path, CompileOptions("welder"))
    assert hf_layers.relative_error(found, layer.expected()) <= 2e-3
    assert launches == LAUNCHES[name]


@pytest.mark.parametrize("clip", ["Min", "Max"])
def test_a_clip_without_an_end_is_compiled(clip: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    nodes = [("MatMul", ("x", "w"), "m"), ("Mul", ("m", "m"), "q"), (clip, ("q", "c"), "y")]
    path = save(tmp_path / "model.onnx", nodes, {"w": weight, "c": np.float32(3)})
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found, _ = run(path, states, tmp_path, CompileOptions("welder"))
    square = (states.numpy() @ weight) ** 2
    expected = torch.from_numpy(np.minimum(square, 3) if clip == "Min" else np.maximum(square, 3))
    assert hf_layers.relative_error(found, expected) <= 2e-3


# The exporter's default, where attention and norms are spelled out.
@pytest.mark.parametrize("name", hf_layers.parameters(LAUNCHES, sample=("qwen3", "olmo2")))
def test_it_takes_as_many_launches_however_it_is_spelled(name: str, tmp_path: Path) -> None:
    layer = hf_layers.exported(name, opset=20)
    found, launches = run(layer.path, layer.given, tmp_path, CompileOptions("welder"))
    assert hf_layers.relative_error(found, layer.expected()) <= 2e-3
    assert launches == LAUNCHES[name]


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "mistral"])
def test_chunks_of_a_long_sequence(name: str, tmp_path: Path) -> None:
    layer = hf_layers.exported(name, 1, 150)
    whole = compile_file(layer.path, CompileOptions()).plan.nbytes
    found, _ = run(layer.path, layer.given, tmp_path, CompileOptions(budget=whole * 4 // 5))
    assert hf_layers.relative_error(found, layer.expected()) <= 2e-3


def test_a_window_that_is_longer_than_the_sequence_is_none(tmp_path: Path) -> None:
    layer = hf_layers.exported("mistral", 2, 8, "eager")
    found, _ = run(layer.path, layer.given, tmp_path, CompileOptions())
    assert hf_layers.relative_error(found, layer.expected()) <= 2e-3


@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_quantised_weights_against_the_graph_on_what_they_decode_to(
    form: str, tmp_path: Path
) -> None:
    module, given, path = hf_layers.exported("gpt_neox")
    found, _ = run(path, given, tmp_path, CompileOptions(format=form))
    packed = packed_layer.load(tmp_path / bundle.WEIGHTS)
    compiled = compile_file(path, CompileOptions(format=form))
    for name, weight in compiled.parameters.matrices.items():
        decoded = packed.matrices[name].dequantise().numpy()
        # The graph's own nodes hold these objects.
        object.__setattr__(weight, "array", Array(name, decoded))
        object.__setattr__(weight, "rows", np.arange(len(decoded)))
    expected = evaluate(compiled.graph, given)
    assert hf_layers.relative_error(found, expected) <= 2e-3
    assert hf_layers.relative_error(expected, module(given)) > 2e-2


def test_matrices_that_are_kept_among_quantised_ones(tmp_path: Path) -> None:
    kept = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    module, given, path = hf_layers.exported("llama")
    module = deepcopy(module)
    names = ("query", "output", "gate", "down")
    found, _ = run(
        path, given, tmp_path, CompileOptions(format="int8", activation="int8", kept=names)
    )
    exact, int8 = module(given), formats.get("int8")

    def rounded(x: Tensor) -> Tensor:
        return int8.dequantise(int8.quantise(x.half().flatten(0, -2))).view(x.shape)

    # The same module, where what is not kept is rounded, and what it multiplies.
    for name, linear in module.block.named_modules():
        if isinstance(linear, torch.nn.Linear) and name not in kept:
            linear.weight.data = rounded(linear.weight)
            linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    # An 8-bit rounding is a step function (see `engine.packed.reference`): whole layers of int8
    # differ by up to 3.8e-3 from a module that keeps all else in fp32.
    expected = module(given)
    assert hf_layers.relative_error(found, expected) <= 4e-3
    assert hf_layers.relative_error(exact, expected) > 5e-3


ACTIVATIONS = [key for key in formats.names() if formats.get(key).is_activation]
# Norms before, after, and before and after; attention and MLP beside each other.
_IN_PLACE = ("llama", "olmo2", "exaone4", "gemma2", "glm4", "phi")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", hf_layers.parameters(LAUNCHES, sample=_IN_PLACE))
def test_the_output_over_the_input_is_the_output_beside_it(
    name: str, activation: str, tmp_path: Path
) -> None:
    layer = hf_layers.exported(name)
    options = CompileOptions(format="int8", activation=activation)
    (tmp_path / "beside").mkdir()
    beside, _ = run(layer.path, layer.given, tmp_path / "beside", replace(options, in_place=False))
    over, _ = run(layer.path, layer.given, tmp_path, options)
    torch.testing.assert_close(over, beside, rtol=0, atol=0)
