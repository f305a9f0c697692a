"""The layers that are measured. One file a model in `families/`; the file's name is its key.

A layer is described by a Hugging Face configuration, read from a local file or from the model's
own; nothing is downloaded and no code of a checkpoint runs. This module and the models'
files stay light: torch and transformers are imported when a layer is built.

A model's file defines `TITLE`, `VALUES` and `NARROW` (configurations), `read` (a `config.json` to
the values that the layer depends on), `outline` and `widths`. Any other family's `config.json` is
read by `catalogue`, which has transformers describe it.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from memladder.core.errors import ConfigError, UnavailableError, UsageError
from memladder.core.folders import entries
from memladder.models import families
from memladder.models.config import (
    CacheGeometry,
    LayerConfig,
    LayerGroup,
    LayerOutline,
    ModelConfig,
    Shapes,
    Subject,
    count_elements,
)

__all__ = [
    "CacheGeometry",
    "LayerConfig",
    "LayerGroup",
    "LayerOutline",
    "ModelConfig",
    "Shapes",
    "Subject",
    "Widths",
    "cache_geometry",
    "class_name",
    "count_elements",
    "definition",
    "has_alibi",
    "hidden_size",
    "layer_config",
    "load_json",
    "names",
    "narrow_config",
    "outline",
    "parameters",
    "quantization",
    "require_fixed_positions",
    "tensor_shapes",
    "widths",
]

ALIBI_FAMILIES = ("bloom", "mpt")
FIXED_ROPE_TYPES = ("default", "linear", "llama3")
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Widths:
    """Numbers a token: all heads' queries, all heads' keys, the MLP's inner activations; and how
    many numbers describe all positions."""

    queries: int
    keys: int
    inner: int
    positions: int


@functools.cache
def names() -> tuple[str, ...]:
    """Keys of all models, sorted."""
    return entries(families.__path__)


def title(model: str) -> str:
    """A model's name in tables and figures; that of an unknown one is its key."""
    return str(definition(model).TITLE) if model in names() else model


def definition(model: str) -> ModuleType:
    """The file of that model. Raises UsageError for an unknown one."""
    if model not in names():
        raise UsageError(f"unknown model {model!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{families.__name__}.{model}")


def layer_config(model: str, path: Path | None = None) -> LayerConfig:
    """The model's own configuration, or the one in a local `config.json` of the same model type.

    Raises UsageError for an unknown model and ConfigError for a file that can't be used.
    """
    module = definition(model)
    if path is None:
        return LayerConfig(model, module.read(module.VALUES))
    raw = load_json(path)
    found = raw.get("model_type")
    if not isinstance(found, str):
        raise ConfigError(f"{path}: no model_type; wanted {model!r}")
    if found != model:
        raise ConfigError(
            f"{path}: model_type is {found[:40]!r} where {model!r} was asked for; "
            f"known: {', '.join(names())}"
        )
    try:
        return LayerConfig(model, module.read(raw))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def narrow_config(model: str) -> LayerConfig:
    """A layer of the same kind, small enough to compare numerically within seconds."""
    module = definition(model)
    return LayerConfig(model, module.read(module.NARROW))


def outline(config: LayerConfig) -> LayerOutline:
    """What the layer is made of."""
    if config.outline is not None:
        return config.outline
    found: LayerOutline = definition(config.model).outline(config.values)
    return found


def hidden_size(config: LayerConfig) -> int:
    """Width of the layer's input and output."""
    return outline(config).hidden_size


def tensor_shapes(config: LayerConfig) -> Shapes:
    """Names and shapes of the layer's parameters; a matrix is [out, in]."""
    return outline(config).shapes


def cache_geometry(config: LayerConfig) -> CacheGeometry:
    """What the layer keeps of earlier tokens."""
    return outline(config).cache


def widths(config: LayerConfig) -> Widths:
    """Widths of what the layer computes."""
    found: Widths = definition(config.model).widths(config.values)
    return found


def class_name(family: str) -> str:
    """The class of transformers' causal language model of a family. Imports transformers for
    those that have no file in `families`."""
    if family in names():
        return str(definition(family).CLASS_NAME)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def has_alibi(config: LayerConfig) -> bool:
    """Are positions told by ALiBi: a number that is added to each score?"""
    given = config.values.get("alibi")
    return bool(given) or config.model in ALIBI_FAMILIES


def require_fixed_positions(config: LayerConfig) -> None:
    """Raise UnavailableError where positions are not the same for all lengths of a sequence, or
    their tables scale attention: no program for all lengths can have them."""
    values = config.values
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    # One for all layers, or one for each of their types.
    for one in (given, *(part for part in given.values() if isinstance(part, Mapping))):
        kind = one.get("rope_type", one.get("type", "default"))
        if kind not in FIXED_ROPE_TYPES:
            raise UnavailableError(
                f"ladder has no rotary positions of type {str(kind)[:40]!r}; it has "
                f"{', '.join(FIXED_ROPE_TYPES)}"
            )


def parameters(config: LayerConfig) -> int:
    """Number of parameters.

    >>> parameters(layer_config("llama")), parameters(layer_config("bloom"))
    (855654400, 2466437120)
    """
    return count_elements(tensor_shapes(config))


def quantization(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where a `config.json` says that its checkpoint is quantised, and by which method; None where
    it says nothing of it."""
    for key in ("quantization_config", "compression_config"):
        given = raw.get(key)
        if given:
            method = given.get("quant_method") if isinstance(given, Mapping) else None
            return key, str(method)[:40]
    return None


def load_json(path: Path) -> dict[str, Any]:
    """The object in a `config.json`. Raises ConfigError."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: too large to be a config.json")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return raw
