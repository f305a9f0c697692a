"""The layers that are measured. One file a model; the file's name is its key.

A layer is described by a Hugging Face configuration, read from a local file or from the model's
file here; nothing is downloaded and no code of a checkpoint runs. This module and the models'
files stay light: torch and transformers are imported when a layer is built.

A model's file defines `TITLE`, `VALUES` and `NARROW` (configurations), `read` (a `config.json` to
the values that the layer depends on), `tensor_shapes`, `widths`, `require_fixed_positions`, and the
three steps that `layer.py` builds a module from: `block`, `inputs` and `call`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from memladder.core.errors import ConfigError, UsageError

_NOT_MODELS = {
    "architecture",
    "cache",
    "ends",
    "fields",
    "gguf_export",
    "gguf_import",
    "layer",
    "onnx_export",
    "onnx_rules",
    "reference",
    "weights",
}
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer's configuration: those values of a Hugging Face `config.json` that it uses.

    Two files that differ only elsewhere (vocabulary, number of layers) give equal configurations.
    """

    model: str
    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that differ whenever a value differs."""
        text = json.dumps([self.model, self.values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Widths:
    """Numbers a token: all heads' queries, all heads' keys, the MLP's inner activations; and how
    many numbers describe all positions."""

    queries: int
    keys: int
    inner: int
    positions: int


def names() -> tuple[str, ...]:
    """Keys of all models, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(set(found) - _NOT_MODELS))


def title(model: str) -> str:
    """A model's name in tables and figures; that of an unknown one is its key."""
    return str(definition(model).TITLE) if model in names() else model


def definition(model: str) -> ModuleType:
    """The file of that model. Raises UsageError for an unknown one."""
    if model not in names():
        raise UsageError(f"unknown model {model!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{model}")


def layer_config(model: str, path: Path | None = None) -> LayerConfig:
    """The model's own configuration, or the one in a local `config.json` of the same model type.

    Raises UsageError for an unknown model and ConfigError for a file that can't be used.
    """
    module = definition(model)
    if path is None:
        return LayerConfig(model, module.read(module.VALUES))
    raw = _load(path)
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


def hidden_size(config: LayerConfig) -> int:
    """Width of the layer's input and output."""
    size = config.values["hidden_size"]
    assert isinstance(size, int)
    return size


def tensor_shapes(config: LayerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the layer's parameters; a matrix is [out, in]."""
    shapes: dict[str, tuple[int, ...]] = definition(config.model).tensor_shapes(config.values)
    return shapes


def widths(config: LayerConfig) -> Widths:
    """Widths of what the layer computes."""
    found: Widths = definition(config.model).widths(config.values)
    return found


def parameters(config: LayerConfig) -> int:
    """Number of parameters.

    >>> parameters(layer_config("llama")), parameters(layer_config("bloom"))
    (855654400, 2466437120)
    """
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def _load(path: Path) -> dict[str, Any]:
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
