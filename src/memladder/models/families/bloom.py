"""BLOOM-176B's decoder layer: LayerNorm, ALiBi, multi-head attention, GELU; biases everywhere.

Source: Workshop et al. 2022, "BLOOM", and the published config.json of bigscience/bloom.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memladder.models import CacheGeometry, LayerOutline, Widths, fields

TITLE = "BLOOM"
CLASS_NAME = "BloomForCausalLM"

VALUES: Mapping[str, Any] = {
    "model_type": "bloom",
    "hidden_size": 14336,
    "n_head": 112,
    "n_layer": 70,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 250880,
}

# 6 heads are no power of two, as 112 are not: ALiBi then has two series of slopes.
NARROW: Mapping[str, Any] = {
    **VALUES,
    "hidden_size": 384,
    "n_head": 6,
    "n_layer": 3,
    "vocab_size": 160,
}

LAYER_PREFIXES = ("transformer.h.{}.", "h.{}.")
"""How a layer's tensors begin in a checkpoint: of the causal model, or of the bare one."""


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the layer depends on. Raises ConfigError naming the field.

    The published files of the BLOOM family use two spellings of the width and of the heads. Where
    both are there transformers takes `n_embed` and `num_attention_heads`.
    """
    hidden = fields.size(raw, "n_embed", "hidden_size")
    heads = fields.size(raw, "num_attention_heads", "n_head")
    fields.divides("n_head", heads, "hidden_size", hidden)
    return {
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_head": heads,
        "layer_norm_epsilon": fields.positive(raw, "layer_norm_epsilon", 1e-5),
        "apply_residual_connection_post_layernorm": fields.flag(
            raw, "apply_residual_connection_post_layernorm"
        ),
    }


def outline(values: Mapping[str, Any]) -> LayerOutline:
    """Parameter names as in `BloomBlock`. The FFN is 4 × hidden wide."""
    size = values["hidden_size"] // values["n_head"]
    cache = CacheGeometry(values["n_head"], size, size)
    return LayerOutline(values["hidden_size"], _tensor_shapes(values), cache)


def _tensor_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = values["hidden_size"]
    matrices = {
        "self_attention.query_key_value": (3 * hidden, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, (rows, columns) in matrices.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def widths(values: Mapping[str, Any]) -> Widths:
    """Of what the layer computes for each token."""
    hidden = values["hidden_size"]
    return Widths(queries=hidden, keys=hidden, inner=4 * hidden, positions=values["n_head"])
