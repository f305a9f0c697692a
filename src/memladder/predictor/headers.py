"""Weights as a checkpoint stores them: the headers of its safetensors files, and nothing else.

A header is JSON behind its length in eight bytes
(github.com/huggingface/safetensors, "Format"); no tensor is read.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memladder.core.errors import ConfigError

_LIMIT = 100 << 20
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
_TOWER = re.compile(r"(?:^|\.)(?:vision|visual|audio|vision_tower|multi_modal_projector)")
_SCALES = ("scale", "scales", "zeros", "qzeros", "g_idx", "absmax", "scale_inv", "zero_point")


@dataclass(frozen=True)
class Checkpoint:
    """Bytes by what they are: of layers, of their scales, around them, of other towers."""

    weights: int
    scales: int
    around: int
    towers: int
    files: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.scales + self.around + self.towers


def read(folder: Path) -> Checkpoint | None:
    """What the safetensors in a folder hold; None where there is none. Raises ConfigError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    sizes = {"weights": 0, "scales": 0, "around": 0, "towers": 0}
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                sizes[_kind(name)] += _nbytes(file, name, entry)
    return Checkpoint(**sizes, files=len(files))


def _kind(name: str) -> str:
    if _TOWER.search(name):
        return "towers"
    if not _LAYER.search(name):
        return "around"
    leaf = name.rpartition(".")[2]
    return "scales" if leaf.removeprefix("weight_") in _SCALES else "weights"


def _nbytes(file: Path, name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(one) is int for one in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise ConfigError(f"{file}: the header says nothing sensible of {name[:60]!r}")
    return int(offsets[1] - offsets[0])


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            first = opened.read(8)
            size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= size <= _LIMIT:
                raise ConfigError(f"{file}: no safetensors: its header would have {size} bytes")
            found = json.loads(opened.read(size))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file}: its header is no JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: its header is no object")
    return found
