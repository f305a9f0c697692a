"""Which model is meant: one of ours by name, or any family's local `config.json`.

Reading is light: transformers describes a configuration in a process of its own, once; what it said
is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memladder import models
from memladder.core import children
from memladder.core.errors import CacheError, ConfigError, UnavailableError, UsageError
from memladder.core.serial import from_json
from memladder.core.text import clean
from memladder.models import ModelConfig, cache

# What is described in another way is another file.
_RECIPE = "1"
_NEEDED = ("torch", "transformers")
_INSTALL = "pip install 'memladder[layers]'"
_LONGEST_S = 300
_CONFIG = "config.json"


def config_path(text: str) -> Path:
    """The `config.json` that a path means: the file itself, or the one in a folder.

    Raises UsageError where the text is neither a model's name nor a path to one.
    """
    path = Path(text)
    if path.is_dir():
        path = path / _CONFIG
        if not path.is_file():
            raise UsageError(f"{path.parent}: no {_CONFIG} there")
        return path
    if not path.is_file():
        known = ", ".join(models.names())
        raise UsageError(
            f"unknown model {text[:80]!r}; known: {known}, or a path to a {_CONFIG} or its folder"
        )
    return path


def short_name(path: Path) -> str:
    """A model's name in cases and tables: its file's, or its folder's, as lower-case words.

    >>> short_name(Path("hub/Qwen3-8B/config.json"))
    'qwen3_8b'
    """
    text = path.resolve().parent.name if path.name == _CONFIG else path.stem
    words = "_".join(re.findall(r"[a-z0-9]+", text.lower()))
    return words if words[:1].isalpha() else f"model_{words}".rstrip("_")


def named(model: str, cache_dir: Path) -> ModelConfig:
    """The whole of one of our models."""
    return _described(dict(models.definition(model).VALUES), model, cache_dir)


def narrow(model: str, cache_dir: Path) -> ModelConfig:
    """A whole model of the same kind, small enough to compare numerically within seconds."""
    return _described(dict(models.definition(model).NARROW), model, cache_dir)


def read(path: Path, cache_dir: Path) -> ModelConfig:
    """The model of a `config.json`. Raises ConfigError for a file that describes none,
    UnavailableError where transformers is not here to tell."""
    raw = models.load_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise ConfigError(f"{path}: no model_type")
    return _described(raw, str(path), cache_dir)


def _described(raw: Mapping[str, Any], where: str, cache_dir: Path) -> ModelConfig:
    missing = [name for name in _NEEDED if _version(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed: needed to read {where}"
        raise UnavailableError(reason, _INSTALL)
    text = json.dumps(raw, sort_keys=True)
    key = f"{_RECIPE} {_version('transformers')} {text}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_dir / "models" / f"{digest}.json"
    cache.made(path, lambda part: part.write_text(_asked(text, where), encoding="utf-8"))
    try:
        return from_json(ModelConfig, json.loads(path.read_bytes()))
    except (ValueError, OSError, ConfigError):
        raise CacheError(f"{path} is damaged; without it, it is made again") from None


def _asked(text: str, where: str) -> str:
    """What `describe` prints, in a process of its own."""
    command = children.module("memladder.models.describe")
    try:
        done = children.run(command, given=text, timeout_s=_LONGEST_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{where}: not described within {_LONGEST_S} s") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason was given"]
        raise ConfigError(f"{where}: {clean(lines[-1])}")
    return done.stdout


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
