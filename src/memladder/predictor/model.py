"""From what a user names to an architecture: a preset, a config.json, or its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memladder import models
from memladder.core.errors import ConfigError
from memladder.core.units import format_bytes
from memladder.models.architecture import Architecture, reading
from memladder.models.catalogue import short_name
from memladder.predictor import headers

_MAX_BYTES = 16 << 20
# What files of published layers leave out, for the whole of them.
_WHOLES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 80, "vocab_size": 32000, "torch_dtype": "float16"},
    "bloom": {"n_layer": 70, "vocab_size": 250880, "seq_length": 2048},
}


@dataclass(frozen=True)
class Model:
    """An architecture, what to call it, and its checkpoint where one lies beside the file."""

    name: str
    architecture: Architecture
    checkpoint: headers.Checkpoint | None = None


def find(named: str) -> Model:
    """The model of a preset's name or of a path. Raises ConfigError."""
    if named in _WHOLES:
        raw = dict(models.definition(named).VALUES) | _WHOLES[named]
        return Model(named, reading.read(raw))
    path = Path(named)
    file = path / "config.json" if path.is_dir() else path
    name = short_name(file)
    raw = _raw(file)
    checkpoint = headers.read(file.parent)
    try:
        return Model(name, reading.read(raw), checkpoint)
    except ConfigError as error:
        held = (
            f"; by the headers of {checkpoint.files} safetensors files its weights take "
            f"{format_bytes(checkpoint.nbytes)}"
            if checkpoint
            else ""
        )
        raise ConfigError(f"{file}: {error}{held}") from None


def _raw(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{file}: too large to be a config.json")
        raw = json.loads(file.read_bytes())
    except OSError as error:
        known = ", ".join(_WHOLES)
        raise ConfigError(
            f"{file}: {error.strerror or error}; a model is {known}, or a config.json or its folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return raw
