"""Vision and audio towers of multimodal models: parameters, estimated from their configuration.

A tower is counted as a plain transformer encoder with a projector; engines that run the text
alone do not hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOWERS = ("vision_config", "audio_config", "vision_tower_config")


def tower_parameters(raw: Mapping[str, Any], text_hidden: int) -> int:
    """Parameters of all towers that the file describes; 0 where it describes none."""
    return sum(
        _encoder(part, text_hidden)
        for name in _TOWERS
        if isinstance(part := raw.get(name), Mapping)
    )


def _whole(values: Mapping[str, Any], *names: str) -> int:
    found = next((values[n] for n in names if isinstance(values.get(n), int)), 0)
    return int(found)


def _encoder(values: Mapping[str, Any], text_hidden: int) -> int:
    """Attention 4 H², MLP 2 or 3 matrices, patches, positions, and a projector to the text."""
    hidden = _whole(values, "hidden_size", "embed_dim", "d_model")
    layers = _whole(values, "num_hidden_layers", "depth", "encoder_layers")
    inner = _whole(values, "intermediate_size", "encoder_ffn_dim") or 4 * hidden
    gated = str(values.get("hidden_act", "")) == "silu"
    patch = _whole(values, "patch_size", "spatial_patch_size") or 14
    image = _whole(values, "image_size")
    positions = (image // patch) ** 2 if image else 0
    layer = 4 * hidden**2 + (3 if gated else 2) * hidden * inner
    layer += 8 * hidden + inner  # biases and norms
    projected = _whole(values, "out_hidden_size") or text_hidden
    return layers * layer + hidden * (3 * patch**2 + positions) + hidden * projected
