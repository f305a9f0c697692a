"""Any family's `config.json`: parameters, groups of layers and caches, against the families' own
papers and published counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memladder import models
from memladder.core import digests
from memladder.core.case import Workload
from memladder.core.errors import ConfigError, UsageError
from memladder.models import ModelConfig, catalogue, describe

CONFIGS = Path(__file__).parents[2] / "configs"
# All parameters, as published with each model; DeepSeek-V3's without its predictor of a second
# token and the 58 × 256 numbers that correct its router.
COUNTS = {
    "bloom-7b1": 7_069_016_064,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-8b": 8_190_735_360,
}
MORE_COUNTS = {
    "bloom-176b": 176_247_271_424,
    "command-r7b": 8_028_033_024,
    "deepseek-v3": 671_026_404_352,
    "falcon-7b": 6_921_720_704,
    "gpt-neox-20b": 20_554_567_680,
    "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mpt-7b": 6_649_286_656,
    "olmo-2-1b": 1_484_916_736,
    "opt-1.3b": 1_315_758_080,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm3-3b": 3_075_098_624,
}
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
}


def parameters(model: ModelConfig) -> int:
    layers = sum(group.count * models.parameters(group.layer) for group in model.layers)
    return layers + models.count_elements(model.around)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *COUNTS.items(),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_COUNTS.items()),
    ],
)
def test_parameters_are_those_published(name: str, count: int) -> None:
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    assert parameters(describe.describe(raw)) == count


def described(family: str, **values: Any) -> ModelConfig:
    return describe.describe({"model_type": family, **NARROW, **values})


def numbers(model: ModelConfig) -> list[tuple[int, ...]]:
    return [group.numbers for group in model.layers]


def test_layers_that_differ_are_groups() -> None:
    gemma = described("gemma3_text", sliding_window=8)
    # Every sixth attends to everything: Gemma 3's report, section 2.
    assert numbers(gemma) == [(0, 1, 2, 3, 4), (5,)]
    windows = [models.cache_geometry(group.layer).window for group in gemma.layers]
    assert windows == [8, None]
    assert gemma.usual.number == 0
    assert gemma.layer(5).number == 5
    with pytest.raises(ConfigError, match="layers 0 … 5, not 6"):
        gemma.layer(6)
    # Every fourth has no positions: SmolLM3's report.
    assert numbers(described("smollm3")) == [(0, 1, 2, 4, 5), (3,)]
    assert numbers(described("qwen3")) == [tuple(range(6))]


def test_experts_are_a_layer_of_another_kind() -> None:
    found = described("qwen3_moe", num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2)
    assert numbers(found) == [(0, 2, 4), (1, 3, 5)]
    dense, sparse = (models.parameters(group.layer) for group in found.layers)
    assert sparse - dense == 4 * 3 * 64 * 32 + 4 * 64 - 3 * 64 * 96


def test_a_layers_own_place_makes_no_group_of_it() -> None:
    deep = described("llama", num_hidden_layers=40)
    assert [group.count for group in deep.layers] == [40]


@pytest.mark.parametrize(
    ("family", "values", "heads", "size"),
    [
        ("llama", NARROW, 2, 16),
        ("gpt2", {"n_embd": 64, "n_head": 4}, 4, 16),
        ("falcon", {"hidden_size": 64, "num_attention_heads": 4, "multi_query": True}, 1, 16),
        ("bloom", {"hidden_size": 64, "n_head": 8}, 8, 8),
        ("mpt", {"d_model": 64, "n_heads": 4}, 4, 16),
    ],
)
def test_caches_have_the_papers_sizes(
    family: str, values: Mapping[str, Any], heads: int, size: int
) -> None:
    raw = {"model_type": family, "vocab_size": 128, **values}
    cache = models.cache_geometry(describe.describe(raw).usual)
    assert cache.elements(Workload(3, 1, 9)) == 3 * 10 * heads * 2 * size


def test_a_window_bounds_the_cache() -> None:
    cache = models.cache_geometry(described("mistral", sliding_window=8).usual)
    assert cache.window == 8
    assert cache.elements(Workload(1, 1, 100)) == 8 * 2 * 2 * 16
    assert cache.elements(Workload(1, 1, 3)) == 4 * 2 * 2 * 16


def test_latent_caches_say_their_width() -> None:
    found = described(
        "deepseek_v3",
        head_dim=8,
        num_key_value_heads=4,
        n_routed_experts=8,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
    )
    assert numbers(found) == [(0, 1), (2, 3, 4, 5)]
    assert models.cache_geometry(found.usual).latent == 24 + 8


def test_a_text_part_is_taken_and_told() -> None:
    text = {**NARROW, "model_type": "gemma3_text"}
    found = describe.describe({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert found.family == "gemma3_text"
    assert found.note == "the text part (gemma3_text) of a gemma3 model"
    assert found.layers == described("gemma3_text").layers


def test_tied_embeddings_are_counted_once() -> None:
    tied, apart = described("qwen3", tie_word_embeddings=True), described("qwen3")
    assert (tied.tied, apart.tied) == (True, False)
    assert parameters(apart) - parameters(tied) == 128 * 64


def test_a_checkpoints_quantisation_is_told() -> None:
    found = described("llama", quantization_config={"quant_method": "awq", "bits": 4})
    assert found.quantization == "awq"
    assert found.layers == described("llama").layers


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "made_up"}, "model_type 'made_up' is not known"),
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "t5"}, "no causal language model of type t5"),
        ({"model_type": "clip"}, "no causal language model of type clip"),
        ({**NARROW, "model_type": "llama", "num_hidden_layers": 10**9}, "number of layers"),
        ({**NARROW, "model_type": "qwen3", "hidden_size": 10**18}, "can't build this qwen3"),
        ({**NARROW, "model_type": "qwen3", "hidden_size": "wide"}, "can't build this qwen3"),
        ({**NARROW, "model_type": "llama", "hidden_size": None}, "llama"),
    ],
)
def test_what_is_no_decoder_is_one_line(raw: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe.describe(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_needs_no_torch_and_asks_once(tmp_path: Path) -> None:
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**NARROW, "model_type": "qwen3"}))
    code = (
        "import sys; from pathlib import Path; from memladder.models import catalogue;"
        "found = catalogue.read(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print(found.class_name, found.layer_count, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Qwen3ForCausalLM", "6", "False"]
    (kept,) = (tmp_path / "cache" / "models").glob("*.json")
    kept.write_text(kept.read_text().replace("Qwen3ForCausalLM", "Kept"))
    digests.note(kept, digests.of(kept))
    assert catalogue.read(path, tmp_path / "cache").class_name == "Kept"


def test_paths_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"no config\.json there"):
        catalogue.config_path(str(folder))
    file = folder / "config.json"
    file.write_text("{}")
    assert catalogue.config_path(str(folder)) == catalogue.config_path(str(file)) == file
    assert catalogue.short_name(file) == "qwen3_8b"
    assert catalogue.short_name(tmp_path / "llama-3.1-8b.json") == "llama_3_1_8b"
    with pytest.raises(UsageError, match="unknown model 'gpt'; known: bloom, llama, or a path"):
        catalogue.config_path("gpt")
    with pytest.raises(ConfigError, match="no model_type"):
        catalogue.read(file, tmp_path)
