"""Whole models from a config.json: counts against transformers' own, and public numbers."""

from typing import Any

import pytest

from memladder.core.errors import ConfigError
from memladder.models.architecture import reading
from memladder.models.architecture.families import FAMILIES

# What transformers can't build from its own defaults (5.24), or builds no language model of.
_NOT_BUILT = {"ministral", "nemotron", "hunyuan_v1_dense", "hunyuan_v1_moe", "dots1", "mistral4"}
_NOT_BUILT |= {"lfm2_moe", "nemotron_h"}
_QUICK = {"llama", "bloom", "gemma3_text", "qwen3_moe", "deepseek_v2", "qwen3_next", "jamba"}


def _counted(family: str) -> tuple[int, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Corrections of the router's scores are in the checkpoint and no parameters.
    kept = ("e_score", "expert_bias")
    found = sum(p.numel() for p in model.parameters())
    found += sum(b.numel() for n, b in model.named_buffers() if any(k in n for k in kept))
    return found, config.to_dict()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name in FAMILIES
        if name not in _NOT_BUILT
    ],
)
def test_parameters_are_those_of_transformers(family: str) -> None:
    expected, raw = _counted(family)
    assert reading.read(raw).parameters == expected


def test_an_unknown_family_says_what_could_be_read() -> None:
    with pytest.raises(ConfigError, match=r"no rules for the family 'xyz'; read: hidden_size 64"):
        reading.read({"model_type": "xyz", "hidden_size": 64})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers '0'"),
        ({"num_hidden_layers": True}, "num_hidden_layers 'True'"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'"),
        ({"num_hidden_layers": 10**6}, "above 4096"),
        ({"layer_types": ["full_attention"]}, "1 layers where num_hidden_layers is 32"),
        ({"layer_types": ["spiral"] * 32}, "spiral not known"),
        ({"quantization_config": "int4"}, "is not an object"),
    ],
)
def test_senseless_values_are_one_line(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reading.read({"model_type": "llama", "hidden_size": 4096} | changed)


def test_windows_alternate_as_the_family_says() -> None:
    gemma = reading.read({"model_type": "gemma3_text", "num_hidden_layers": 62})
    counts = {group.layer.kind: group.count for group in gemma.groups}
    assert counts == {"window": 52, "full": 10}


def test_latent_caches_are_one_vector() -> None:
    found = reading.read({"model_type": "deepseek_v3"})
    assert {group.layer.cache.token_elements(8) for group in found.groups} == {512 + 64}
