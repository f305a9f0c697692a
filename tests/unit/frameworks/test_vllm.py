"""What vLLM is told, in numbers from elsewhere; the engine itself runs on a GPU only."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.errors import UnavailableError
from memladder.core.units import KIB, MIB, mib
from memladder.frameworks import vllm
from memladder.frameworks._shared import vllm_engine
from memladder.frameworks._shared.base import Job, packed_bytes
from memladder.models import LayerConfig, describe
from memladder.paper.rows import SHAPES


@pytest.mark.parametrize(
    ("model", "bits", "group_size", "expected"),
    # design notes of Figure 11: weights with fp16 scales, norms and biases, MiB
    [
        ("llama", 4, 128, 420.8),
        ("llama", 4, 64, 433.5),
        ("bloom", 4, 128, 1213.1),
        ("bloom", 4, 64, 1249.9),
    ],
)
def test_packed_weights_take_what_the_figure_says(
    model: str, bits: int, group_size: int, expected: float
) -> None:
    found = packed_bytes(models.layer_config(model), bits, group_size, 16)
    assert mib(found) == pytest.approx(expected, abs=0.05)


def test_a_shorter_last_group_has_a_scale_too() -> None:
    config = models.narrow_config("llama")
    # down_proj's rows are 704 = 5 · 128 + 64 long: 6 groups in each of its 256 rows, all others 2.
    rows = 256 + 128 + 128 + 256 + 704 + 704
    scales = 2 * (2 * rows + 6 * 256)
    elements = 737_792 - 512
    assert packed_bytes(config, 4, 128, 16) == elements // 2 + scales + 2 * 512


@pytest.mark.parametrize(
    ("shape", "blocks"),
    # 16 tokens a block, one block for padding
    [
        (Workload(1, 1), 2),
        (Workload(32, 1), 33),
        (Workload(1, 4096), 257),
        (Workload(1, 16), 2),
        (Workload(3, 17), 7),
    ],
)
def test_the_cache_holds_the_case_and_no_more(shape: Workload, blocks: int) -> None:
    assert vllm_engine.kv_blocks(shape) == blocks


def arguments_of(model: str, shape: Workload) -> dict[str, Any]:
    return vllm_engine.engine_arguments([(1, models.layer_config(model))], "fp16", shape)


def test_the_cache_is_counted_in_bytes() -> None:
    shape = Workload(1, 4096)
    # 2 · 4096 tokens · 8 heads · 128 · 2 bytes are 16 MiB, BLOOM's 112 heads 224 MiB.
    for model, whole, block in (("llama", 16 * MIB, 64 * KIB), ("bloom", 224 * MIB, 896 * KIB)):
        arguments = arguments_of(model, shape)
        assert arguments["kv_cache_memory_bytes"] == whole + block


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step_takes_the_batch_and_a_long_prompt_comes_in_parts(shape: Workload) -> None:
    arguments = arguments_of("llama", shape)
    assert arguments["max_num_batched_tokens"] == {1: 1, 32: 32, 4096: 512}[shape.tokens]
    assert arguments["max_num_seqs"] == shape.batch_size
    assert arguments["max_model_len"] == shape.seq_len + 1


def test_bloom_gets_a_backend_that_has_alibi() -> None:
    shape = Workload(1, 1)
    bloom = arguments_of("bloom", shape)
    llama = arguments_of("llama", shape)
    assert bloom["attention_config"] == {"backend": "TRITON_ATTN"}
    assert "attention_config" not in llama


@pytest.mark.parametrize(
    ("model", "variant"), [("llama", "vllm"), ("bloom", "vllm"), ("llama", "vllm_fp16_int4")]
)
def test_the_model_is_the_layer_alone(model: str, variant: str, tmp_path: Path) -> None:
    framework = frameworks.get(variant)
    case = Case(model, variant, Workload(1, 4096), "cuda:0")
    job = Job(case, models.layer_config(model), tmp_path)
    framework.prepare(job)
    (path,) = tmp_path.rglob("config.json")
    found = json.loads(path.read_text())
    assert found["num_hidden_layers"] == 1
    assert (found["vocab_size"], found["tie_word_embeddings"]) == (64, True)
    assert found["hidden_size"] == {"llama": 8192, "bloom": 14336}[model]
    if model == "llama":
        assert found["max_position_embeddings"] == 4097
    assert ("quantization_config" in found) == (variant == "vllm_fp16_int4")
    # The config makes a layer of the same shapes again.
    again = models.layer_config(model, path)
    assert models.tensor_shapes(again) == models.tensor_shapes(job.config)


def whole(name: str, variant: str, shape: Workload, folder: Path) -> Job:
    raw = json.loads((Path(__file__).parents[2] / f"configs/{name}.json").read_text())
    model = describe.describe(raw)
    case = Case(name.partition("-")[0], variant, shape, "cuda:0", "all")
    return Job(case, model.usual, folder, 0, model)


@pytest.mark.parametrize(
    ("name", "layers", "vocabulary", "length"),
    [("llama-2-70b", 80, 32_000, 4098), ("bloom-7b1", 30, 250_880, 4098)],
)
def test_a_whole_model_is_its_own_config(
    name: str, layers: int, vocabulary: int, length: int, tmp_path: Path
) -> None:
    job = whole(name, "vllm", Workload(1, 1, 4096), tmp_path)
    frameworks.get("vllm").prepare(job)
    (path,) = tmp_path.rglob("config.json")
    found = json.loads(path.read_text())
    assert (found["num_hidden_layers"], found["vocab_size"]) == (layers, vocabulary)
    assert found.get("max_position_embeddings", found.get("seq_length")) == length
    # The file makes the same model again.
    assert describe.describe(found).layers[0].count == layers


def test_a_whole_models_bytes_are_those_of_its_layers(tmp_path: Path) -> None:
    job = whole("llama-2-70b", "vllm", Workload(32, 1, 1024), tmp_path)
    framework = frameworks.get("vllm")
    assert framework.weight_bytes(job) == 80 * 2 * 855_654_400
    # 32 · 65 blocks and one more, 16 tokens each, 80 layers, 8 heads of 128, keys and values.
    assert framework.cache_bytes(job) == 2081 * 16 * 80 * 2 * 8 * 128 * 2
    arguments = vllm_engine.engine_arguments(job.groups, "fp16", job.case.shape)
    assert arguments["enable_prefix_caching"] is True
    assert arguments["max_model_len"] == 1026


def test_no_sequence_finds_anothers_past() -> None:
    shape = Workload(4096, 1, 31)
    prompts = vllm_engine.prompts(shape, 64)
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 4096
    assert vllm_engine.remembered(shape) == 16
    assert vllm_engine.remembered(Workload(1, 1, 4096)) == 4096


def test_groups_are_as_long_as_all_rows_allow() -> None:
    assert vllm_engine.group_size(models.layer_config("llama")) == 128
    assert vllm_engine.group_size(models.layer_config("bloom")) == 128
    # 704 is no multiple of 128.
    assert vllm_engine.group_size(models.narrow_config("llama")) == 64
    odd = LayerConfig("llama", {**models.narrow_config("llama").values, "intermediate_size": 700})
    with pytest.raises(UnavailableError, match=r"multiples of 64, not of 700 elements"):
        vllm_engine.group_size(odd)


class Linear(nn.Module):
    """A linear module as vLLM's describe themselves, however its weight is stored."""

    def __init__(self, input_size: int, *output_sizes: int, bias: bool = False) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size, self.output_sizes = sum(output_sizes), list(output_sizes)
        self.weight_packed = nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.output_size)) if bias else None


class Attention(nn.Module):
    """vLLM's attention: with quantised weights it has scalars of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.k_zero_point = nn.Parameter(torch.zeros(1))


class Norm(nn.Module):
    def __init__(self, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's two base classes, as far as they are looked at."""
    layers = "vllm.model_executor.layers"
    for name in ("vllm", "vllm.model_executor", layers):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, kind in (("linear", Linear), ("attention", Attention)):
        module = ModuleType(f"{layers}.{name}")
        setattr(module, {"linear": "LinearBase", "attention": "Attention"}[name], kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_llamas_fused_matrices_are_told_one_by_one(modules: None) -> None:
    layer = nn.ModuleDict(
        {
            "input_layernorm": Norm(256),
            "self_attn": nn.ModuleDict(
                {
                    "qkv_proj": Linear(256, 256, 128, 128),
                    "o_proj": Linear(256, 256),
                    "attn": Attention(),
                }
            ),
            "mlp": nn.ModuleDict(
                {"gate_up_proj": Linear(256, 704, 704), "down_proj": Linear(704, 256)}
            ),
            "post_attention_layernorm": Norm(256),
        }
    )
    assert vllm._shapes(layer) == models.tensor_shapes(models.narrow_config("llama"))


def test_blooms_matrices_and_biases_have_its_own_names(modules: None) -> None:
    def norm() -> Norm:
        return Norm(384, bias=True)

    layer = nn.ModuleDict(
        {
            "input_layernorm": norm(),
            "self_attention": nn.ModuleDict(
                {
                    "query_key_value": Linear(384, 384, 384, 384, bias=True),
                    "dense": Linear(384, 384, bias=True),
                    "attn": Attention(),
                }
            ),
            "post_attention_layernorm": norm(),
            "mlp": nn.ModuleDict(
                {
                    "dense_h_to_4h": Linear(384, 1536, bias=True),
                    "dense_4h_to_h": Linear(1536, 384, bias=True),
                }
            ),
        }
    )
    assert vllm._shapes(layer) == models.tensor_shapes(models.narrow_config("bloom"))


def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = frameworks.get("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = framework.availability("cuda:0")
    assert (found.available, found.install) == (False, "memladder env create vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(vllm.importlib.metadata, "version", lambda _: "0.22.1")
    assert framework.availability("cpu").reason == "vLLM's package runs on CUDA only"
    monkeypatch.setattr(vllm, "cuda_build", lambda: "13.0")
    assert framework.availability("cuda:0").available
    assert framework.availability("cuda:1").install == ("set CUDA_VISIBLE_DEVICES=1 and use cuda:0")
