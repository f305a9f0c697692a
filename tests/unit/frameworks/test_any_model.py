"""Layers and whole models of many families in PyTorch, in this process, over a past and without:
against transformers' own model in float32, which sees whole sequences at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memladder import frameworks, models
from memladder.core.case import ALL, Case, Workload
from memladder.core.errors import UnavailableError
from memladder.frameworks._shared.base import Job
from memladder.frameworks._shared.torch_whole import source
from memladder.models import ModelConfig, describe, reference, weights, whole
from tests.hf_layers import LAYERS
from tests.layers import started

# torch and transformers warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

PAST = Workload(2, 3, past=13)
# Beside the layers that are exported in other tests: experts, latent caches, layers of two kinds.
MORE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 2, "num_experts": 8}),
    "cohere2": ("cohere2", {"num_key_value_heads": 2, "sliding_window": 8}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt_oss": ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}),
    "exaone4": ("exaone4", {"num_key_value_heads": 2, "sliding_window": 8}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, "sliding_window": 8}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "q_lora_rank": 32,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
    ),
}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
IN_CI = ("bloom", "gemma2")


def described(name: str) -> ModelConfig:
    family, values = LAYERS[name] if name in LAYERS else (name, {**_SIZES, **MORE[name][1]})
    sizes = {"vocab_size": 128, "num_hidden_layers": 4}
    return describe.describe({"model_type": family, **sizes, **values})


def names(chosen: tuple[str, ...] = IN_CI) -> list[Any]:
    every = [name for name in (*LAYERS, *MORE) if name not in ("diffllama", "falcon_grouped")]
    return [
        pytest.param(name, marks=[] if name in chosen else [pytest.mark.slow]) for name in every
    ]


def whole_job(model: ModelConfig, workload: Workload, cache_dir: Path, layers: int | str) -> Job:
    case = Case("any", "pytorch", workload, "cpu", layers)
    return Job(case, model.usual, cache_dir, 0, model)


@pytest.mark.parametrize("name", names())
def test_a_pass_over_a_past_is_the_end_of_a_whole_sequence(name: str, cache_dir: Path) -> None:
    framework = frameworks.get("pytorch")
    for group in described(name).layers:
        job = Job(Case("any", "pytorch", PAST, "cpu"), group.layer, cache_dir)
        session, _ = started(job)
        path = weights.ensure(group.layer, cache_dir, 0)
        expected = reference.output(group.layer, path, PAST, 0)
        assert reference.error(session.output(), expected) < framework.tolerance("cpu")
        held = session.categories()
        assert held["kv_cache"] == framework.cache_bytes(job)
        assert held["weights"] == framework.weight_bytes(job)


@pytest.mark.parametrize("name", names(("gemma2",)))
def test_whole_models_are_computed_right(name: str, cache_dir: Path) -> None:
    framework = frameworks.get("pytorch")
    model = described(name)
    for workload in (Workload(2, 3), PAST):
        job = whole_job(model, workload, cache_dir, ALL)
        session, _ = started(job)
        expected = whole.reference(source(job), workload)
        bound = framework.tolerance("cpu") * math.sqrt(model.layer_count + 1)
        assert reference.error(session.output(), expected) < bound
        held = session.categories()
        assert held["weights"] == framework.weight_bytes(job)
        assert held["embeddings"] == 2 * models.count_elements(model.around)
        assert held.get("kv_cache", 0) == framework.cache_bytes(job)
        # Kinds that differ in their cache alone are the same code without one.
        assert 1 <= int(session.settings()["compiled_layers"]) <= len(model.layers)


def test_the_reference_is_the_model_that_transformers_loads(cache_dir: Path) -> None:
    """Against a model built in full, its parameters filled by name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = described("qwen3")
    job = whole_job(model, PAST, cache_dir, ALL)
    made = whole.Whole(source(job), Workload(1, 1), torch.float32, torch.device("cpu"))
    config = AutoConfig.for_model(model.family, **model.values)
    own = AutoModelForCausalLM.from_config(config).eval()
    own.load_state_dict(made.model.state_dict())
    ids = torch.from_numpy(whole.token_ids(source(job), PAST))
    with torch.inference_mode():
        logits = own(input_ids=ids).logits[:, -1:].numpy()
    np.testing.assert_allclose(whole.reference(source(job), PAST), logits, rtol=0, atol=1e-5)


def test_the_first_layers_of_a_model(cache_dir: Path) -> None:
    model = described("gemma2")
    job = whole_job(model, PAST, cache_dir, 3)
    assert [count for count, _ in job.groups] == [2, 1]
    session, _ = started(job)
    expected = whole.reference(source(job), PAST)
    bound = frameworks.get("pytorch").tolerance("cpu") * 2
    assert reference.error(session.output(), expected) < bound


def test_what_a_framework_cannot_run_has_a_reason(cache_dir: Path) -> None:
    model = described("qwen3")
    tensorrt = frameworks.get("tensorrt")
    past = Job(Case("any", "tensorrt", PAST, "cuda:0"), model.usual, cache_dir)
    assert "no key-value cache" in str(tensorrt.refuses(past))
    layer = Job(Case("any", "tensorrt", Workload(1, 1), "cuda:0"), model.usual, cache_dir)
    assert "runs layers of bloom and llama here, not qwen3" in str(tensorrt.refuses(layer))
    assert "single layers" in str(tensorrt.refuses(whole_job(model, PAST, cache_dir, ALL)))
    assert frameworks.get("pytorch").refuses(whole_job(model, PAST, cache_dir, ALL)) is None


def test_a_layer_with_a_state_has_no_past(cache_dir: Path) -> None:
    values = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    model = describe.describe({"model_type": "mamba", **values})
    job = Job(Case("any", "pytorch", PAST, "cpu"), model.usual, cache_dir)
    with pytest.raises(UnavailableError, match="a state of fixed size"):
        frameworks.get("pytorch").prepare(job)
