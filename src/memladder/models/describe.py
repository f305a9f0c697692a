"""A `config.json` of any family as a `ModelConfig`: transformers builds it without weights.

    python -m memladder.models.describe < config.json

A process of its own, so that whoever asks needs no torch: it prints the `ModelConfig` as JSON, or
one line on stderr with exit status 2.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memladder import models
from memladder.core.case import Workload
from memladder.core.errors import ConfigError, MemladderError
from memladder.core.serial import to_json
from memladder.models import capture
from memladder.models.capture import Call, Decoder
from memladder.models.config import (
    CacheGeometry,
    LayerConfig,
    LayerGroup,
    LayerOutline,
    ModelConfig,
)

# Several sequences of several tokens: layers that are called differently are told apart by it.
_SHAPE = Workload(2, 5)
# A window that is as long as the longest sequence is none.
_LONG = 1 << 40
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def describe(raw: Mapping[str, Any]) -> ModelConfig:
    """The causal language model of a configuration, or of its text part where it nests one.

    Raises ConfigError for a family that transformers lacks, an encoder, senseless values.
    """
    family, values, note = _text_part(raw)
    decoder = Decoder(family, values)
    with capture.as_config_errors(family):
        groups = _groups(decoder, family, values)
    table = decoder.model.get_input_embeddings().weight
    head = decoder.model.get_output_embeddings()
    config = decoder.config
    positions = getattr(config, "max_position_embeddings", None)
    quantised = models.quantization(raw)
    return ModelConfig(
        family=family,
        class_name=type(decoder.model).__name__,
        values=values,
        hidden_size=decoder.hidden_size,
        vocab_size=table.shape[0],
        tied=head is not None and head.weight is table,
        max_positions=positions if isinstance(positions, int) else None,
        layers=groups,
        around={name: tuple(value.shape) for name, value in decoder.around().items()},
        quantization=None if quantised is None else quantised[1],
        note=note,
    )


def _text_part(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """Model type and values of the decoder, and what was left out, in words."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = raw["model_type"]
    if family not in CONFIG_MAPPING:
        raise ConfigError(f"model_type {family[:40]!r} is not known to this transformers")
    nested = next((name for name in _TEXT_PARTS if isinstance(raw.get(name), Mapping)), None)
    if nested is None:
        return family, _kept(raw), None
    values = dict(raw[nested])
    inner = values.get("model_type")
    if not isinstance(inner, str):
        own = CONFIG_MAPPING[family].sub_configs.get(nested)
        inner = getattr(own, "model_type", None)
    if not isinstance(inner, str) or inner not in CONFIG_MAPPING:
        raise ConfigError(f"{nested} has no model_type that this transformers knows")
    # Some models say it outside alone.
    if "tie_word_embeddings" in raw:
        values.setdefault("tie_word_embeddings", raw["tie_word_embeddings"])
    return inner, _kept(values), f"the text part ({inner}) of a {family} model"


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the model depends on; private and checkpoint-only keys go."""
    dropped = (*capture.DROPPED, "architectures", "transformers_version", "torch_dtype", "dtype")
    kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in dropped}
    kept.pop("model_type", None)
    return kept


def _groups(decoder: Decoder, family: str, values: Mapping[str, Any]) -> tuple[LayerGroup, ...]:
    alone = decoder.calls(_SHAPE, torch.float32)
    cached = decoder.calls(_SHAPE, torch.float32, keep=True)
    cache = decoder.static_cache(_LONG)
    found: dict[str, LayerGroup] = {}
    for number, block in enumerate(decoder.blocks):
        geometry = _geometry(block, number, cached[number], decoder, cache.layers[number])
        shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
        outline = LayerOutline(decoder.hidden_size, shapes, geometry)
        key = json.dumps([to_json(outline), list(_nature(block)), _told(alone[number])])
        if key in found:
            found[key] = replace(found[key], numbers=(*found[key].numbers, number))
        else:
            layer = _layer(family, values, number, outline)
            found[key] = LayerGroup((number,), layer)
    return tuple(found.values())


def _layer(
    family: str,
    values: Mapping[str, Any],
    number: int,
    outline: LayerOutline,
) -> LayerConfig:
    """A family that has a file here says its layers itself; transformers must agree."""
    if family not in models.names():
        return LayerConfig(family, values, number, outline)
    layer = LayerConfig(family, models.definition(family).read(values))
    assert models.outline(layer) == outline, f"{family}'s file and transformers disagree"
    return layer


def _nature(block: nn.Module) -> Iterator[str]:
    """Classes and plain attributes of a layer and of all its parts, without its place."""
    for name, module in block.named_modules():
        yield f"{name}: {type(module).__name__}"
        for attribute, value in sorted(vars(module).items()):
            plain = isinstance(value, bool | int | float | str) or value is None
            if plain and attribute not in capture.PLACES and not attribute.startswith("_"):
                yield f"{name}.{attribute}={value}"


def _told(call: Call) -> str:
    """What a layer is passed, as a digest."""
    digest = hashlib.sha256()
    for place, tensor in sorted(call.tensors().items()):
        digest.update(f"{place} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _NotedError(Exception):
    """The keys and values are known."""


def _geometry(
    block: nn.Module, number: int, call: Call, decoder: Decoder, kept: Any
) -> CacheGeometry:
    """What a layer writes into a cache, seen when it does so with tensors that have no values."""
    if hasattr(kept, "update_recurrent_state"):
        return CacheGeometry(recurrent=True)
    latent = getattr(decoder.config, "kv_lora_rank", None)
    if latent is not None:
        latent += decoder.config.qk_rope_head_dim
    cache = decoder.static_cache(_SHAPE.seq_len)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
        seen.append((keys, values))
        raise _NotedError

    cache.layers[number].update = note
    on_meta = {place: tensor.to("meta") for place, tensor in call.tensors().items()}
    sizes = (_SHAPE.batch_size, _SHAPE.seq_len, decoder.hidden_size)
    states = torch.zeros(sizes, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            capture.call_block(block, states, call.replaced(on_meta, cache))
    except _NotedError:
        keys, values = seen[0]
        window = getattr(kept, "max_cache_len", _LONG)
        return CacheGeometry(
            keys.shape[1],
            keys.shape[-1],
            values.shape[-1],
            window if window < _LONG else None,
            latent,
        )
    return CacheGeometry()


def main() -> int:
    """Describe what stands on standard input."""
    try:
        found = describe(json.load(sys.stdin))
    except MemladderError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(to_json(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
