"""Narrow whole models of Hugging Face transformers with random weights: checkpoints, packed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memladder.engine.compile import whole
from memladder.engine.packed import checkpoint
from memladder.engine.packed.folder import Options
from memladder.formats._shared.base import Format
from tests.hf_layers import LAYERS

VOCABULARY = 97


def model(name: str, **values: Any) -> nn.Module:
    """A model of the family of `LAYERS`' name, in float32; its values are float16's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = LAYERS[name]
    given: Mapping[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, **own, **values}
    config = AutoConfig.for_model(kind, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(3)
    tables = {id(m.weight) for m in found.modules() if isinstance(m, nn.Embedding)}
    for parameter in found.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if id(parameter) not in tables:
            drawn *= parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data = (drawn + (parameter.dim() == 1)).half().float()
    return found.requires_grad_(False)


def saved(module: Any, folder: Path, shard: str = "5GB") -> Path:
    """The model as a checkpoint in float16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.half().save_pretrained(folder, max_shard_size=shard)
    module.float()
    return folder


def packed(source: Path, folder: Path, form: str = "fp16", **options: Any) -> Path:
    """The checkpoint, packed."""
    whole.pack(
        checkpoint.open_all(source), Options(form, **options), folder, lambda what, done, all: None
    )
    return folder


def expected(module: Any, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence, by transformers."""
    with torch.inference_mode():
        found: Tensor = module(torch.tensor([ids])).logits[0]
    return found


def worst(found: Tensor, reference: Tensor) -> float:
    """The largest relative error of a row."""
    lost = torch.linalg.vector_norm(found.double() - reference.double(), dim=-1)
    return float((lost / torch.linalg.vector_norm(reference.double(), dim=-1)).max())


def dequantised(module: Any, source: Path, folder: Path) -> nn.Module:
    """transformers' model with the weights of a packed folder."""
    from copy import deepcopy

    from memladder.engine.compile import layers
    from memladder.engine.packed import folder as folders
    from memladder.engine.packed import packed_layer, rest
    from memladder.models import cache

    index, found = folders.opened(folder), deepcopy(module)
    tensors = dict(found.named_parameters())
    opened = checkpoint.open_all(source)
    for layer in opened.layers:
        compiled = layers.ensure(layer.config, cache.default_dir())
        held = packed_layer.load(folder / folders.layer_file(layer.number))
        for name, matrix in held.matrices.items():
            start, rows = 0, matrix.dequantise()
            for first, last in compiled.sources[name].ranges:
                stored = layer.places[compiled.sources[name].tensor][1]
                target = tensors.get(stored, tensors.get(f"{module.base_model_prefix}.{stored}"))
                assert target is not None
                target.data[first:last] = rows[start : start + last - first]
                start += last - first
    assert index.rest is not None
    own = rest.load(folder / index.rest.file, index.rest_contents())
    tensors[index.ends.embedding].data = own.matrices["embedding"].dequantise()
    if "head" in own.matrices:
        tensors[index.ends.head].data = own.matrices["head"].dequantise()
    return found


def round_activations(module: Any, activation: Format) -> None:
    """Let a Llama's layers round as the engine does, see `memladder.engine.packed.reference`."""
    from memladder.engine.packed import reference

    for block in module.model.layers:
        reference._round(block, activation, {f"self_attn.{one}_proj" for one in "qkv"})
