"""Whole narrow layers through pack, plan and execution, against Hugging Face's module in fp32."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memladder import formats
from memladder.core.case import Workload
from memladder.core.errors import UnavailableError
from memladder.engine.compile import layers
from memladder.engine.packed import packed_layer
from memladder.engine.packed import reference as packed_reference
from memladder.engine.program.plan import plan
from memladder.engine.run.execute import Execution
from memladder.kernels import naive
from memladder.models import LayerConfig, cache, reference, weights
from tests.layers import narrow

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")

BOUND = 2e-3
ROOT = Path(__file__).parents[3]


def execution(made: LayerConfig, shape: Workload, cache_dir: Path, **options: Any) -> Execution:
    """The fp16 layer in an arena of NaN, its input in place."""
    packed = packed_layer.load(layers.ensure_packed(made, formats.get("fp16"), cache_dir, 0))
    program = packed.form.program(shape, **options)
    planned = plan(program)
    arena = torch.full((planned.nbytes,), 255, dtype=torch.uint8)
    found = Execution(program, planned, packed, naive, arena)
    weights.fill_hidden_states(found.input.numpy(), 0)
    return found


def error(made: LayerConfig, shape: Workload, cache_dir: Path, **options: Any) -> float:
    found = execution(made, shape, cache_dir, **options)
    found.run()
    output = found.output.float().numpy().reshape(shape.batch_size, shape.seq_len, -1)
    path = weights.ensure(made, cache_dir, 0)
    return reference.error(output, reference.output(made, path, shape, 0))


def test_the_packed_layers_reference_turns_by_its_frequencies(cache_dir: Path) -> None:
    config, shape = narrow("llama"), Workload(1, 600)
    packed = packed_layer.load(layers.ensure_packed(config, formats.get("fp16"), cache_dir, 0))
    sources = layers.ensure(config, cache_dir).sources
    path = weights.ensure(config, cache_dir, 0)
    expected = reference.output(config, path, shape, 0)

    def found(factor: float) -> float:
        name = "rotary.frequencies"
        turned = packed.vectors | {name: packed.vectors[name] * factor}
        other = replace(packed, vectors=turned)
        output = packed_reference.output(config, other, sources, shape, 0, None)
        return reference.error(output, expected)

    # The weights are float16 in both; transformers' frequencies are off by a last bit.
    assert found(1) < 1e-5
    assert found(1.01) > 1e-2


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("shape", ["1x1", "32x1", "2x17", "3x600", "1x1025"])
def test_the_layer_at_odd_shapes(model: str, shape: str, cache_dir: Path) -> None:
    assert error(narrow(model), Workload.parse(shape), cache_dir) <= BOUND


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_the_layer_in_chunks_of_any_size(model: str, chunk: int, cache_dir: Path) -> None:
    assert error(narrow(model), Workload(3, 50), cache_dir, chunk=chunk) <= BOUND


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_a_sequence_of_several_chunks_sees_its_earlier_ones(model: str, cache_dir: Path) -> None:
    # The last chunk is one query over 193 keys.
    assert error(narrow(model), Workload(2, 193), cache_dir, chunk=64) <= BOUND


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
        (
            "llama",
            {
                "hidden_act": "relu",
                "head_dim": 32,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        ),
        (
            "llama",
            {
                "hidden_act": "gelu_new",
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        ("bloom", {"apply_residual_connection_post_layernorm": True, "n_head": 12}),
        ("bloom", {"n_head": 8}),
    ],
)
def test_what_a_configuration_may_ask_for(
    model: str, changes: Mapping[str, Any], cache_dir: Path
) -> None:
    # Compiled from an outline of shorter sequences.
    assert error(narrow(model, **changes), Workload(2, 190), cache_dir) <= BOUND


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_an_input_that_is_to_be_kept_is_kept(model: str, cache_dir: Path) -> None:
    shape = Workload(2, 300)
    over = execution(narrow(model), shape, cache_dir)
    over.run()
    beside = execution(narrow(model), shape, cache_dir, in_place=False)
    before = beside.input.clone()
    beside.run()
    assert torch.equal(beside.input, before)
    assert torch.equal(beside.output, over.output)
    beside.run()
    assert torch.equal(beside.output, over.output)


def test_a_weight_that_the_layer_lacks_is_not_left_out(cache_dir: Path) -> None:
    made = narrow("bloom")
    packed = packed_layer.load(layers.ensure_packed(made, formats.get("fp16"), cache_dir, 0))
    # A bias is optional to the kernel: without an error the layer would be computed without it.
    del packed.vectors["up.bias"]
    program = packed.form.program(Workload(1, 1))
    planned = plan(program)
    arena = torch.empty(planned.nbytes, dtype=torch.uint8)
    with pytest.raises(KeyError, match=r"up\.bias"):
        Execution(program, planned, packed, naive, arena)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_positions_that_the_engine_lacks_are_refused_by_name(kind: str, cache_dir: Path) -> None:
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32} if kind == "longrope" else {}
    made = narrow("llama", rope_scaling={"rope_type": kind, "factor": 2.0, **factors})
    with pytest.raises(UnavailableError, match=f"type '{kind}'; it has default, linear, llama3"):
        layers.ensure(made, cache_dir)


def test_rotary_frequencies_are_the_papers(cache_dir: Path) -> None:
    # Su et al. 2021, section 3.2.2: theta_i = 10000^(-2 (i - 1) / d).
    found = layers.ensure(narrow("llama"), cache_dir).constants["rotary.frequencies"]
    expected = 10000.0 ** (-2 * np.arange(32) / 64)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)


def test_scaled_frequencies_are_transformers(cache_dir: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = narrow(
        "llama",
        hidden_act="relu",
        head_dim=32,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )
    found = layers.ensure(made, cache_dir).constants["rotary.frequencies"]
    known = LlamaRotaryEmbedding(LlamaConfig(**made.values)).inv_freq
    torch.testing.assert_close(found, known, rtol=1e-6, atol=0)


def test_alibi_slopes_are_transformers(cache_dir: Path) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    found = layers.ensure(narrow("bloom"), cache_dir).constants["alibi.slopes"]
    # At position 1 the bias is the slope itself.
    known = build_alibi_tensor(torch.ones(1, 2), 6, torch.float32)[:, 0, 1]
    torch.testing.assert_close(found, known, rtol=1e-6, atol=0)


def test_what_is_compiled_once_is_read_afterwards(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = layers.ensure(narrow("llama"), cache_dir)
    monkeypatch.setattr(layers.onnx_export, "outline", None)
    found = layers.ensure(narrow("llama"), cache_dir)
    for shape in (Workload(1, 1), Workload(3, 600)):
        programs = [form.program(shape) for form in (packed(known), packed(found))]
        assert programs[0] == programs[1]
    assert found.sources == known.sources


def test_a_damaged_file_of_the_cache_is_named_and_made_again(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = layers.ensure(narrow("llama"), cache_dir)
    folder = cache.graph_dir(narrow("llama"), cache_dir)
    shutil.copytree(folder, tmp_path / folder.name)
    (path,) = (tmp_path / folder.name).glob("*.json")
    for text in ("{", "[]", "{}", '{"layer": "{}", "sources": {}, "constants": {}}'):
        whole = path.read_bytes()
        path.write_text(text)
        assert layers.ensure(narrow("llama"), tmp_path).sources == known.sources
        assert path.read_bytes() == whole
        assert f"{path} is not as it was written" in capsys.readouterr().err


def packed(compiled: layers.CompiledLayer) -> packed_layer.Form:
    return packed_layer.Form(compiled.fused, formats.get("fp16"), {})


def test_the_process_that_measures_loads_no_exporter(cache_dir: Path) -> None:
    path = layers.ensure_packed(narrow("llama"), formats.get("fp16"), cache_dir, 0)
    code = """if True:
        import sys
        from pathlib import Path
        from memladder import formats, models
        from memladder.core.case import Workload
        from memladder.engine.compile import layers
        from memladder.engine.packed import packed_layer
        from memladder.engine.program import plan
        from memladder.engine.run import execute
        path = layers.ensure_packed(
            models.narrow_config("llama"), formats.get("fp16"), Path(sys.argv[1]), 0
        )
        program = packed_layer.load(path).form.program(Workload(1, 600))
        plan.plan(program)
        print(path, *{name.partition(".")[0] for name in sys.modules})
    """
    command = [sys.executable, "-c", code, str(cache_dir)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    made, *modules = done.stdout.split()
    assert made == str(path)
    assert not {"onnx", "onnxscript", "onnx_ir", "transformers"} & set(modules)
