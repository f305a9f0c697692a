"""Layers as configurations: published sizes, narrow twins, and every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memladder import models
from memladder.core.errors import ConfigError, UsageError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
BLOOM = {"model_type": "bloom", "hidden_size": 512, "n_head": 8}


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_folder_is_the_list_of_models() -> None:
    assert models.names() == ("bloom", "llama")
    with pytest.raises(UsageError, match="unknown model 'gpt'; known: bloom, llama"):
        models.layer_config("gpt")


@pytest.mark.parametrize(("model", "count"), [("llama", 855_654_400), ("bloom", 2_466_437_120)])
def test_parameters_are_those_of_figure_11(model: str, count: int) -> None:
    assert models.parameters(models.layer_config(model)) == count


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_a_file_with_the_models_own_values_is_the_model(model: str, tmp_path: Path) -> None:
    own = models.definition(model).VALUES
    path = write(tmp_path, {**own, "vocab_size": 7, "auto_map": {"AutoConfig": "evil.py"}})
    assert models.layer_config(model, path) == models.layer_config(model)
    assert models.layer_config(model, path).digest == models.layer_config(model).digest


def test_digests_differ_with_any_value(tmp_path: Path) -> None:
    variants = [
        LLAMA,
        {**LLAMA, "rms_norm_eps": 1e-5},
        {**LLAMA, "attention_bias": True},
        {**LLAMA, "head_dim": 32},
        {**LLAMA, "rope_theta": 500000},
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ]
    digests = {models.layer_config("llama", write(tmp_path, v)).digest for v in variants}
    assert len(digests) == len(variants)


def test_older_and_newer_spellings_agree(tmp_path: Path) -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    new = {**LLAMA, "rope_parameters": rope}
    first, second = (models.layer_config("llama", write(tmp_path, values)) for values in (old, new))
    assert first == second
    bloom = {"model_type": "bloom", "n_embed": 512, "num_attention_heads": 8}
    first, second = (models.layer_config("bloom", write(tmp_path, v)) for v in (BLOOM, bloom))
    assert first == second


def rope(folder: Path, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = models.layer_config("llama", write(folder, {**LLAMA, **values})).values
    return found["rope_parameters"]


def test_rope_fields_beside_their_object_are_part_of_it(tmp_path: Path) -> None:
    """As `standardize_rope_params` of transformers has it."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    before = "original_max_position_embeddings"
    positions = {"max_position_embeddings": 131072}
    beside = rope(tmp_path, rope_scaling=llama3, **positions, **{before: 8192})
    assert beside == rope(tmp_path, rope_scaling={**llama3, before: 8192}, **positions)
    assert beside[before] == 8192
    # What stands beside counts where both are there; the longest sequence where neither is.
    both = rope(tmp_path, rope_scaling={**llama3, before: 4096}, **positions, **{before: 8192})
    assert both[before] == 8192
    assert rope(tmp_path, rope_scaling=llama3, **positions)[before] == 131072
    partial = rope(tmp_path, rope_theta=5e5, partial_rotary_factor=0.5)
    assert partial == {
        "rope_type": "default",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
    }
    inside = {"rope_type": "default", "rope_theta": 1e6}
    assert rope(tmp_path, rope_parameters=inside, rope_theta=5e5) == inside
    linear = {"rope_type": "linear", "factor": 4.0}
    chosen = rope(tmp_path, rope_parameters=inside, rope_scaling=linear, rope_theta=5e5)
    assert chosen == {**linear, "rope_theta": 5e5}


def test_blooms_two_spellings_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    both = {"model_type": "bloom", "hidden_size": 64, "n_embed": 256, "n_head": 8}
    config = models.layer_config("bloom", write(tmp_path, both))
    assert models.hidden_size(config) == 256
    heads = models.layer_config("bloom", write(tmp_path, {**both, "num_attention_heads": 4}))
    assert heads.values["n_head"] == 4


def test_positions_have_no_widths_bound(tmp_path: Path) -> None:
    values = {**LLAMA, "max_position_embeddings": 4_194_304}
    config = models.layer_config("llama", write(tmp_path, values))
    assert config.values["max_position_embeddings"] == 4_194_304


def test_heads_of_a_given_size_need_not_divide_the_width(tmp_path: Path) -> None:
    values = {**LLAMA, "hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = models.layer_config("llama", write(tmp_path, {**values, "head_dim": 32}))
    assert models.tensor_shapes(config)["self_attn.q_proj.weight"] == (96, 100)
    with pytest.raises(ConfigError, match="hidden_size 100 is not a multiple"):
        models.layer_config("llama", write(tmp_path, values))


def test_biases_and_multi_head_attention_are_counted(tmp_path: Path) -> None:
    values = {**LLAMA, "num_key_value_heads": None, "attention_bias": True, "mlp_bias": True}
    config = models.layer_config("llama", write(tmp_path, values))
    matrices = 4 * 512 * 512 + 3 * 512 * 1024
    assert models.parameters(config) == matrices + 4 * 512 + 2 * 1024 + 512 + 2 * 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\ud800".encode("utf-8", "replace").decode() + "[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ({}, "no model_type; wanted 'llama'"),
        ({**LLAMA, "model_type": 3}, "no model_type"),
        ({**LLAMA, "model_type": "mamba"}, "model_type is 'mamba' where 'llama' was asked for"),
        (BLOOM, "model_type is 'bloom' where 'llama' was asked for; known: bloom, llama"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ({**LLAMA, "intermediate_size": None}, "intermediate_size is missing"),
        ({**LLAMA, "hidden_size": 0}, "hidden_size '0' is not a whole number"),
        ({**LLAMA, "hidden_size": -8}, "hidden_size '-8' is not a whole number"),
        ({**LLAMA, "hidden_size": 512.0}, "hidden_size '512.0' is not a whole number"),
        ({**LLAMA, "hidden_size": "512"}, "hidden_size '512' is not a whole number"),
        ({**LLAMA, "hidden_size": True}, "hidden_size 'True' is not a whole number"),
        ({**LLAMA, "hidden_size": 1 << 40}, "is not a whole number from 1 to 1048576"),
        ({**LLAMA, "num_attention_heads": 7}, "hidden_size 512 is not a multiple of"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of"),
        ({**LLAMA, "head_dim": 63}, "head_dim 63 is not even"),
        ({**LLAMA, "rms_norm_eps": 0}, "rms_norm_eps '0' is not a number above 0"),
        ({**LLAMA, "rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5' is not a number above 0"),
        ({**LLAMA, "rope_theta": float("nan")}, "rope_theta 'nan' is not a number above 0"),
        ({**LLAMA, "rope_theta": 10**400}, "rope_theta '1000"),
        ({**LLAMA, "rope_scaling": 3}, "rope_parameters '3' is not an object"),
        ({**LLAMA, "rope_scaling": {"type": "magic"}}, "rope_type 'magic' is not one of"),
        ({**LLAMA, "hidden_act": "exec"}, "hidden_act 'exec' is not one of silu"),
        ({**LLAMA, "hidden_act": ["silu"]}, "is not one of silu"),
        ({**LLAMA, "attention_bias": "no"}, "attention_bias 'no' is not true or false"),
    ],
)
def test_a_bad_file_is_one_clear_line(content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        models.layer_config("llama", path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: No such file"):
        models.layer_config("llama", tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        models.layer_config("llama", tmp_path)
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not JSON"):
        models.layer_config("bloom", path)


def test_narrow_layers_are_small_and_of_their_kind() -> None:
    for model in models.names():
        full, narrow = models.layer_config(model), models.narrow_config(model)
        assert set(models.tensor_shapes(full)) == set(models.tensor_shapes(narrow))
        assert models.parameters(narrow) < 4_000_000
    heads = models.narrow_config("bloom").values["n_head"]
    assert heads & (heads - 1), "a power of two would not test both series of ALiBi slopes"
    values = models.narrow_config("llama").values
    assert values["num_attention_heads"] > values["num_key_value_heads"] > 1


def test_configurations_need_no_heavy_library() -> None:
    code = (
        "import sys; from memladder import models, frameworks;"
        "[models.parameters(models.layer_config(m)) for m in models.names()];"
        "[frameworks.get(f).availability(d) for f in frameworks.names()"
        " for d in ('cpu', 'cuda:0')];"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'onnxscript'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
