"""predict and fit: what is asked, how it is refused, and answers that are known."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from memladder.core.errors import ConfigError, UnavailableError, UsageError
from memladder.core.units import GIB, MIB
from memladder.frameworks._rules import stored
from memladder.predictor import api, fit, gpus, model

_CONFIGS = Path(__file__).parents[2] / "configs"
# Published by the models' authors, or counted from their checkpoints.
_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-27b": 27_009_346_304,
    "deepseek-v3": 671_026_419_200,
    "deepseek-v2-lite": 15_706_484_224,
    "bloom-176b": 176_247_271_424,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize(("name", "parameters"), _PARAMETERS.items())
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    assert model.find(str(_CONFIGS / name)).architecture.parameters == parameters


def test_a_tower_is_counted_apart() -> None:
    # google/gemma-3-27b-it has 27,432,406,640 parameters, 423,060,294 of them no text.
    towers = model.find(str(_CONFIGS / "gemma-3-27b")).architecture.towers
    assert abs(towers / 423_060_294 - 1) < 0.001


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("rtx4090", "RTX 4090"),
        ("l40s", "L40S"),
    ],
)
def test_names_of_gpus(name: str, gpu: str) -> None:
    assert gpus.find(name).name == gpu


def test_an_unknown_gpu_has_neighbours() -> None:
    with pytest.raises(UsageError, match=r"unknown GPU 'H1000'; the nearest are .*H100"):
        gpus.find("H1000")


@pytest.mark.parametrize("text", ["18", "GiB", "-3GiB", "1e3GiB", "0GiB"])
def test_a_size_needs_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        gpus.of_size(text)


def test_what_is_free_stands_for_a_gpu() -> None:
    assert gpus.of_size("18GiB").usable_bytes == 18 * GIB


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "batch_size 0 is not"),
        ({"seq_len": 1 << 40}, "seq_len"),
        ({"past": -1}, "past -1"),
        ({"layers": 81}, "layers 81 is not a whole number from 1 to 80"),
        ({"layers": "most"}, "layers 'most'"),
        ({"kv_format": "fp7"}, "unknown format 'fp7'"),
        ({"gpu": "H100", "free": "3GiB"}, "not both"),
        ({"settings": {"gpu_memory_utilization": "2"}}, "is not above 0"),
        ({"version": "new"}, "vLLM version 'new'"),
        ({"version": "0.6.5"}, "0.11 and later"),
    ],
)
def test_senseless_questions(given: dict[str, Any], said: str) -> None:
    asked = {"layers": "all", "past": 1, **given}
    with pytest.raises((UsageError, UnavailableError), match=said):
        api.predict("llama", "vllm", **asked)


def test_no_rules_are_a_reason() -> None:
    with pytest.raises(UnavailableError, match="ladder compiles no experts"):
        api.predict(_CONFIGS / "qwen3-30b-a3b", "ladder")


def test_a_ledger_sums_and_lies_in_its_interval() -> None:
    found = api.predict(_CONFIGS / "llama-3.3-70b", "vllm", past=8191, layers="all", batch_size=8)
    assert found.total_bytes == sum(entry.nbytes for entry in found.ledger.entries)
    assert found.low_bytes < found.total_bytes < found.high_bytes
    # 80 layers x 2 x 8 heads x 128 x 2 bytes a token, and one block for padding.
    assert found.ledger.nbytes("kv_cache") == 80 * 4096 * (8 * 8192 + 16)


def test_windows_bound_a_cache() -> None:
    long = api.predict(_CONFIGS / "gemma-3-27b", "vllm", past=65535, layers="all")
    width = 2 * 16 * 128 * 2
    windowed = 52 * width * (1024 + 16)  # a part of one token, in blocks of 16
    full = 10 * width * 65536
    assert long.ledger.nbytes("kv_cache") == windowed + full + 62 * width * 16


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128 + 32 / 8192),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "mxfp4"}, None),
    ],
)
def test_quantisation_of_a_checkpoint(config: dict[str, Any], bits: float | None) -> None:
    raw = json.loads((_CONFIGS / "llama-3.3-70b" / "config.json").read_text())
    architecture = model.reading.read(raw | {"quantization_config": config})
    chosen = stored.checkpoint(architecture)
    matrix = next(t for t in architecture.groups[0].layer.tensors if "q_proj" in t.name)
    scheme = chosen.scheme_of(matrix, 0)
    if bits is None:
        assert scheme is None  # only experts
        return
    assert scheme is not None
    held = sum(scheme.matrix(*matrix.shape))
    assert held / matrix.elements * 8 == pytest.approx(bits, rel=1e-6)


def test_ignored_modules_stay() -> None:
    raw = json.loads((_CONFIGS / "llama-3.3-70b" / "config.json").read_text())
    config = {
        "quant_method": "fp8",
        "ignored_layers": ["lm_head", "model.layers.3.mlp", "re:.*k_proj"],
    }
    chosen = stored.checkpoint(model.reading.read(raw | {"quantization_config": config}))
    layer = model.reading.read(raw).groups[0].layer
    kept = {
        (t.name, number)
        for t in layer.tensors
        for number in (2, 3)
        if t.linear and chosen.scheme_of(t, number) is None
    }
    mlp = {(f"mlp.{name}_proj.weight", 3) for name in ("gate", "up", "down")}
    assert kept == mlp | {("self_attn.k_proj.weight", 2), ("self_attn.k_proj.weight", 3)}


def test_an_unknown_quantisation_is_refused_by_name() -> None:
    raw = json.loads((_CONFIGS / "llama-3.1-8b" / "config.json").read_text())
    architecture = model.reading.read(raw | {"quantization_config": {"quant_method": "magic"}})
    with pytest.raises(UnavailableError, match="no rules for quant_method 'magic'"):
        stored.checkpoint(architecture)


def _safetensors(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_headers_tell_an_unknown_family_s_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "xyz", "hidden_size": 8}')
    entry = {"dtype": "F16", "shape": [8, 8], "data_offsets": [0, 3 * MIB]}
    _safetensors(tmp_path / "m.safetensors", json.dumps({"a.layers.0.w": entry}).encode())
    with pytest.raises(ConfigError, match=r"no rules for the family 'xyz'.*weights take 3.0 MiB"):
        model.find(str(tmp_path))


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [3, 1]}}'])
def test_damaged_headers(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _safetensors(tmp_path / "m.safetensors", header)
    with pytest.raises(ConfigError, match=r"m\.safetensors"):
        model.find(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "gpu", "row", "fits"),
    [
        ("llama-3.3-70b", "H100", ("vllm", "fp16"), False),  # 141 GB of weights
        ("llama-3.3-70b", "H200", ("vllm", "fp16"), True),
        ("llama-3.3-70b", "8xH100", ("vllm", "fp16"), True),
        ("qwen3-235b-a22b", "8xH100", ("vllm", "fp16"), True),  # 470 GB over 640
        ("gemma-3-27b", "RTX 4090", ("vllm_fp16_int4", "int4"), True),
        ("gemma-3-27b", "RTX 4090", ("vllm", "fp16"), False),
        ("deepseek-v3", "8xH100", ("vllm", "checkpoint"), False),  # 671 GB over 640
        ("bloom-176b", "8xH100", ("vllm", "fp16"), True),  # 353 GB over 640
        ("bloom-176b", "L40S", ("vllm_fp16_int4", "int4"), False),
    ],
)
def test_fit(name: str, gpu: str, row: tuple[str, str], fits: bool) -> None:
    rows = {(one.framework, one.format): one for one in api.fit(_CONFIGS / name, gpu)}
    assert rows[row].fits is fits
    if fits:
        assert (rows[row].most_context or 0) >= 4096
        assert (rows[row].most_batch or 0) >= 1


# NVIDIA's table of compute capabilities: T4 7.5, RTX A6000 8.6, RTX 4090 8.9.
@pytest.mark.parametrize(
    ("gpu", "row", "least"),
    [
        ("T4", "welder", "8.0"),
        ("T4", "ladder_fp16_int4", "8.0"),
        ("RTX A6000", "ladder_fp16_int4", None),
        ("RTX A6000", "ladder_fp8_fp8", "8.9"),
        ("RTX A6000", "ladder_mxfp8_mxfp8", "8.9"),
        ("RTX A6000", "torchao_fp8_fp8", "8.9"),
        ("RTX 4090", "ladder_fp8_fp8", None),
        ("RTX 4090", "torchao_fp8_fp8", None),
        ("cpu", "ladder_fp8_fp8", None),
    ],
)
def test_a_gpu_without_the_arithmetic_is_refused(gpu: str, row: str, least: str | None) -> None:
    if least is None:
        assert api.predict("llama", row, gpu=gpu).total_bytes > 0
        return
    with pytest.raises(UnavailableError, match=rf" needs compute capability {least}$"):
        api.predict("llama", row, gpu=gpu)


@pytest.mark.parametrize(
    ("row", "cache", "said"),
    [
        ("ladder_fp16_int4", "q4_0", "ladder has no cache in q4_0; allowed: auto, fp16, fp8, int8"),
        ("ladder_fp16_int4", "fp8", "ladder's cache in fp8 needs compute capability 8.9"),
        ("vllm", "q8_0", "vLLM has no cache in q8_0; allowed: auto, fp16, bf16, fp8"),
        ("llamacpp_int4", "fp8", "llama.cpp has no cache in fp8; allowed: auto, fp16"),
        ("pytorch", "fp8", "a torch layer has no cache in fp8; allowed: auto, fp16, bf16"),
    ],
)
def test_a_cache_that_a_framework_has_not_is_refused(row: str, cache: str, said: str) -> None:
    with pytest.raises(UnavailableError, match=said):
        api.predict("llama", row, past=1, kv_format=cache, gpu="RTX A6000")


@pytest.mark.parametrize(("cache", "head"), [("auto", 256), ("fp8", 132), ("int8", 132)])
@pytest.mark.parametrize("gpu", ["H100", "cpu"])
def test_ladder_s_cache_has_its_scales(cache: str, head: int, gpu: str) -> None:
    """A head of 128: two bytes a number, or one and a float32 scale; 8 heads, 32 layers."""
    found = api.predict(
        _CONFIGS / "llama-3.1-8b", "ladder", batch_size=3, past=999, layers="all",
        kv_format=cache, gpu=gpu,
    )  # fmt: skip
    assert found.ledger.nbytes("kv_cache") == 2 * 32 * 8 * head * 3 * 1000


def test_ladder_s_window_is_whole_tiles(tmp_path: Path) -> None:
    """Mistral-7B-v0.1 sees 4096 tokens: 32 tiles of 128 hold 4095 before a token and itself."""
    config = json.loads((_CONFIGS / "mistral-7b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 4096}))
    for past, seq_len, tokens in ((5000, 1, 4096), (5000, 2, 4224), (4000, 1, 4001)):
        found = api.predict(tmp_path, "ladder", past=past, seq_len=seq_len)
        assert found.ledger.nbytes("kv_cache") == 2 * 8 * 256 * tokens


def test_gpus_of_two_generations_are_each_asked() -> None:
    """H100's context was measured, others' not, so that their intervals are wider."""
    together = api.fit("llama", ["H100", "RTX A6000", "T4"])
    apart = [row for gpu in ("H100", "RTX A6000", "T4") for row in api.fit("llama", gpu)]
    assert list(together) == apart
    rows = {(row.gpu, row.framework): row for row in together}
    for name in ("ladder", "vllm_fp16_int4"):
        one, other = rows["H100", name], rows["RTX A6000", name]
        assert (one.high_bytes or 0) + 128 * MIB == other.high_bytes
    assert rows["T4", "ladder"].reason == "Ladder needs compute capability 8.0"


def test_the_largest_context_fits_and_more_does_not() -> None:
    (row, *_) = [r for r in api.fit(_CONFIGS / "llama-3.1-8b", "RTX 4090") if r.format == "fp16"]
    assert row.most_context is not None
    room = gpus.find("RTX 4090").usable_bytes

    def needed(tokens: int) -> int:
        found = api.predict(
            _CONFIGS / "llama-3.1-8b", row.framework, past=tokens - 1, layers="all", gpu="RTX 4090"
        )
        return found.total_bytes

    assert needed(row.most_context) <= room < needed(row.most_context * 102 // 100)


def test_nowhere_says_by_how_much() -> None:
    text = fit.summary(api.fit(_CONFIGS / "deepseek-v3", ["RTX 4090", "L40S"]))
    assert text.startswith("fits nowhere: the closest, ")
    assert text.endswith(" GiB short")


# MiB of the arena in the engine's own plans of these layers, compiled from ONNX (alignment aside).
@pytest.mark.parametrize(
    ("name", "row", "batch_size", "seq_len", "arena"),
    [
        ("llama-3-8b", "ladder_fp16_int4", 64, 1, 2.75),
        ("llama-3-8b", "ladder_fp16_int4", 8, 512, 50.0),
        ("llama-3-8b", "ladder_fp16_int4", 1, 1024, 26.0),
        ("llama-3-8b", "ladder_fp16_int4", 1, 4096, 56.0),
        ("llama-3-8b", "ladder_fp8_fp8", 8, 512, 53.0),
        ("llama-3-8b", "ladder_fp8_fp8", 1, 4096, 56.0),
        ("llama-3-8b", "ladder_int8_int1", 1, 4096, 54.0),
        ("bloom-7b1", "ladder_fp16_int4", 8, 512, 52.0),
        ("bloom-7b1", "ladder_fp8_fp8", 1, 1024, 32.0),
        ("bloom-7b1", "ladder_int8_int1", 1, 4096, 102.0),
    ],
)
def test_the_arena_is_the_plan_s(
    name: str, row: str, batch_size: int, seq_len: int, arena: float
) -> None:
    found = api.predict(_CONFIGS / name, row, batch_size=batch_size, seq_len=seq_len)
    assert found.ledger.nbytes("activations") / MIB == pytest.approx(arena, abs=0.003)
