"""The layers' function, against an implementation in plain numpy that shares nothing with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from memladder import models
from memladder.core.case import Workload
from memladder.models import LayerConfig, reference, weights

SHAPES = [Workload(1, 1), Workload(2, 17), Workload(3, 1), Workload(1, 130)]
Tensors = dict[str, np.ndarray]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis of causal scores [..., S, S]."""
    length = scores.shape[-1]
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_llama(x: np.ndarray, w: Tensors, values: dict) -> np.ndarray:
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    batch, length, _ = x.shape

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    def split(name: str, count: int) -> np.ndarray:  # [B, heads, S, D]
        y = normed @ w[f"self_attn.{name}.weight"].T
        return y.reshape(batch, length, count, -1).transpose(0, 2, 1, 3)

    def rotate(y: np.ndarray) -> np.ndarray:  # pairs (i, i + D/2) as complex numbers
        half = y.shape[-1] // 2
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
        turned = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    normed = norm(x, "input_layernorm")
    q, k, v = split("q_proj", heads), split("k_proj", kv_heads), split("v_proj", kv_heads)
    q, k = rotate(q), rotate(k)
    k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
    mixed = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
    joined = mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    x = x + joined @ w["self_attn.o_proj.weight"].T
    normed = norm(x, "post_attention_layernorm")
    gate = normed @ w["mlp.gate_proj.weight"].T
    up = normed @ w["mlp.up_proj.weight"].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T


def slopes(heads: int) -> np.ndarray:
    """ALiBi's geometric series, and every other term of the next one for what is left over."""
    power = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    second = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return np.array((first + second)[:heads])


def naive_bloom(x: np.ndarray, w: Tensors, values: dict) -> np.ndarray:
    heads = values["n_head"]
    batch, length, _ = x.shape

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        z = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    fused = linear(norm(x, "input_layernorm"), "self_attention.query_key_value")
    q, k, v = fused.reshape(batch, length, heads, 3, -1).transpose(3, 0, 2, 1, 4)
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    mixed = softmax(scores + slopes(heads)[:, None, None] * distance) @ v
    joined = mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    x = x + linear(joined, "self_attention.dense")
    y = linear(norm(x, "post_attention_layernorm"), "mlp.dense_h_to_4h")
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return x + linear(y, "mlp.dense_4h_to_h")


NAIVE: dict[str, Callable[[np.ndarray, Tensors, dict], np.ndarray]] = {
    "llama": naive_llama,
    "bloom": naive_bloom,
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def naive(config: LayerConfig, path: Path, shape: Workload, drop: str | None = None) -> np.ndarray:
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}
    if drop is not None:
        tensors[drop] = np.full_like(tensors[drop], 1.0 if drop.endswith("norm.weight") else 0.0)
    states = weights.hidden_states(config, shape, 0).astype(np.float64)
    return NAIVE[config.model](states, tensors, dict(config.values))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_the_reference_is_the_published_function(
    model: str, shape: Workload, cache_dir: Path
) -> None:
    config = models.narrow_config(model)
    path = weights.ensure(config, cache_dir, 0)
    expected = naive(config, path, shape)
    assert reference.error(reference.output(config, path, shape, 0), expected) < 2e-6


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_no_parameter_could_be_left_out_unnoticed(model: str, cache_dir: Path) -> None:
    config, shape = models.narrow_config(model), Workload(2, 17)
    path = weights.ensure(config, cache_dir, 0)
    whole = naive(config, path, shape)
    for name in models.tensor_shapes(config):
        # Without the key's bias every score of a row moves alike, which softmax does not see;
        # it is a third of BLOOM's fused bias, so that no whole tensor is invisible.
        assert reference.error(naive(config, path, shape, drop=name), whole) > 1.6e-2, name


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_later_tokens_change_nothing_before_them(
    model: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shape = models.narrow_config(model), Workload(2, 17)
    path = weights.ensure(config, cache_dir, 0)
    before = reference.output(config, path, shape, 0)
    states = weights.hidden_states(config, shape, 0)
    states[:, 11:] += 1
    monkeypatch.setattr(reference, "sequence_states", lambda *_: states)
    after = reference.output(config, path, shape, 0)
    np.testing.assert_allclose(after[:, :11], before[:, :11], rtol=0, atol=1e-5)
    assert np.abs(after[:, 11:] - before[:, 11:]).min(axis=-1).max() > 0
    assert np.abs(after[:, 16] - before[:, 16]).max() > 0.1


def test_rounding_grows_with_the_length_for_alibi_only(cache_dir: Path) -> None:
    found = {}
    for model in models.names():
        config = models.narrow_config(model)
        path = weights.ensure(config, cache_dir, 0)
        for length in (16, 2048):
            shape = Workload(1, length)
            rounded = reference.output(config, path, shape, 0, torch.float16)
            found[model, length] = reference.error(
                rounded, reference.output(config, path, shape, 0)
            )
    assert found["llama", 16] == pytest.approx(found["llama", 2048], rel=0.5)
    assert max(found["llama", 16], found["bloom", 16]) < 1e-3
    assert found["bloom", 2048] > 1e-2


def test_nan_is_never_agreement() -> None:
    one = np.ones((1, 2, 3), np.float32)
    assert reference.error(one, one) == 0
    assert reference.error(1.5 * one, one) == pytest.approx(0.5)
    assert np.isnan(reference.error(np.full_like(one, np.nan), one))
