"""Narrow decoder layers of Hugging Face transformers with random weights, exported to ONNX.

The layer is called as its own model calls it: what the model passes besides the hidden states is
recorded from a forward pass, and becomes constants of the export.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

WIDTHS: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 64, "n_head": 4}

# By a name of ours: model type and what its configuration is given.
LAYERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", WIDTHS),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4}),
    "bloom_6": ("bloom", {"hidden_size": 96, "n_head": 6}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in WIDTHS.items() if k != "head_dim"}),
    "opt": (
        "opt",
        {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    ),
    "mistral": ("mistral", {**WIDTHS, "sliding_window": 8}),
    "mistral_full": ("mistral", {**WIDTHS, "sliding_window": None}),
    "qwen2": ("qwen2", WIDTHS),
    "gemma": ("gemma", WIDTHS),
    "falcon": ("falcon", {"hidden_size": 64, "num_attention_heads": 4, "multi_query": True}),
    "falcon_grouped": (
        "falcon",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "falcon_alibi": (
        "falcon",
        {"hidden_size": 64, "num_attention_heads": 4, "alibi": True, "parallel_attn": False},
    ),
    "phi": ("phi", {**WIDTHS, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", WIDTHS),
    "stablelm": ("stablelm", WIDTHS),
    "gemma2": ("gemma2", {**WIDTHS, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**WIDTHS, "sliding_window": 8}),
    "qwen3": ("qwen3", WIDTHS),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4}),
    "cohere": ("cohere", WIDTHS),
    "olmo2": ("olmo2", WIDTHS),
    "olmo3": ("olmo3", {**WIDTHS, "sliding_window": 8}),
    "exaone4": ("exaone4", {**WIDTHS, "sliding_window": 8, "sliding_window_pattern": 4}),
    "granite": ("granite", {**WIDTHS, "attention_multiplier": 0.1, "residual_multiplier": 0.3}),
    "nemotron": ("nemotron", WIDTHS),
    "helium": ("helium", WIDTHS),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8, "n_positions": 512, "n_ctx": 512}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "attention_heads": 4}),
    "glm": ("glm", WIDTHS),
    "glm4": ("glm4", WIDTHS),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "hunyuan": ("hunyuan_v1_dense", WIDTHS),
    # An activation of two branches; two softmaxes, one taken from the other.
    "apertus": ("apertus", WIDTHS),
    "diffllama": ("diffllama", WIDTHS),
}
# Spelled by the layer itself, for lack of another way.
EAGER_ONLY = frozenset(
    ("bloom", "bloom_6", "gemma2", "mpt", "falcon", "falcon_alibi", "xglm", "gptj", "codegen")
)
# What the engine has no kernels for.
UNSUPPORTED = frozenset(("apertus", "diffllama"))


# Put together as others are: left to the slow tests.
_ALIKE = frozenset(
    (
        *("bloom_6", "phi3", "granite", "helium", "glm", "glm4", "gpt_bigcode", "hunyuan"),
        *("codegen", "xglm", "stablelm", "nemotron", "olmo2", "olmo3", "exaone4"),
        *("cohere", "mistral_full", "gemma3"),
    )
)


def parameters(names: Iterable[str], *others: Any, sample: Container[str] = ()) -> list[Any]:
    """Names of `LAYERS` for a test, and what follows each; those outside the sample are slow, and
    without one those that are put together as others are."""

    def marks(name: str) -> list[Any]:
        rest = name not in sample if sample else name in _ALIKE
        return [pytest.mark.slow] if rest else []

    return [pytest.param(name, *others, marks=marks(name)) for name in names]


class Layer(nn.Module):
    """hidden_states [batch_size, seq_len, hidden_size] to the same."""

    def __init__(self, block: nn.Module, passed: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        super().__init__()
        self.block = block
        self._passed, self._named = passed, named

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.block(hidden_states, *self._passed, **self._named)
        return found[0] if isinstance(found, tuple) else found


class _StopError(Exception):
    """The block was reached."""


def layer(name: str, batch_size: int, seq_len: int, dtype: torch.dtype, attention: str) -> Layer:
    """A layer of `LAYERS`; `attention` is how transformers computes it: `sdpa` or `eager`."""
    from transformers import AutoConfig, AutoModel

    kind, values = LAYERS[name]
    config = AutoConfig.for_model(kind, vocab_size=32, num_hidden_layers=1, **values)
    config._attn_implementation = attention
    config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModel.from_config(config).to(dtype).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    _randomise(blocks[0], dtype)
    given: list[Any] = []

    def note(_: nn.Module, passed: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.extend((passed[1:], {k: v for k, v in named.items() if k != "hidden_states"}))
        raise _StopError

    blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    with contextlib.suppress(_StopError):
        model(torch.zeros(batch_size, seq_len, dtype=torch.long))
    blocks[0]._forward_pre_hooks.clear()
    blocks[0]._forward_pre_hooks_with_kwargs.clear()
    blocks[0].requires_grad_(False)
    return Layer(blocks[0], *given)


def _randomise(block: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter matters: see `memladder.models.weights`."""
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        values *= parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data = (values + (parameter.dim() == 1)).to(dtype)


class Exported(NamedTuple):
    """A layer in float32, hidden states, and its ONNX file."""

    module: Layer
    given: Tensor
    path: Path

    def expected(self) -> Tensor:
        """What the layer computes."""
        found: Tensor = self.module(self.given)
        return found


def exported(
    name: str, batch_size: int = 2, seq_len: int = 13, attention: str = "", opset: int = 23
) -> Exported:
    """A layer of `LAYERS`, exported once for all tests; `attention` is by default `sdpa`."""
    default = "eager" if name in EAGER_ONLY else "sdpa"
    return _exported(name, batch_size, seq_len, attention or default, opset)


@cache
def _exported(name: str, batch_size: int, seq_len: int, attention: str, opset: int) -> Exported:
    module = layer(name, batch_size, seq_len, torch.float32, attention)
    given = states(module, batch_size, seq_len, torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="memladder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Exported(module, given, export(module, given, folder / "layer.onnx", opset))


def export(module: nn.Module, states: Tensor, path: Path, opset: int = 23) -> Path:
    """The module as PyTorch's exporter writes it, weights beside it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (states,), dynamo=True, opset_version=opset, verbose=False
        )
    assert program is not None
    program.save(path, external_data=True)
    return path


def states(module: Layer, batch_size: int, seq_len: int, dtype: torch.dtype) -> Tensor:
    """Standard normal hidden states."""
    named = module.named_parameters()
    width = max(p.numel() for name, p in named if "norm" in name or "ln" in name)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch_size, seq_len, width, generator=generator).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    ours, theirs = (x.double().numpy() for x in (found, expected))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
