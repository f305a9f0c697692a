"""The layers that are measured. One file a model; the file's name is its key.

A layer is described by a Hugging Face configuration, read from a local file or from the model's
file here; nothing is downloaded and no code of a checkpoint runs. This module and the models'
configurations stay light: torch and transformers are imported when a layer is built.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch

_NOT_MODELS = {"weights", "onnx_export", "reference", "cache", "layer"}


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer's configuration: the values of a Hugging Face `config.json`."""

    model: str
    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that differ whenever a value differs."""
        text = json.dumps([self.model, self.values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
