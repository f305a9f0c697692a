"""LLaMA-2-70B's decoder layer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al. 2023, "Llama 2", and the published config.json of Llama-2-70b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memladder.core.errors import ConfigError
from memladder.models import CacheGeometry, LayerOutline, Widths, fields

TITLE = "LLAMA"
CLASS_NAME = "LlamaForCausalLM"

VALUES: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "num_hidden_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}

NARROW: Mapping[str, Any] = {
    **VALUES,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 160,
}

LAYER_PREFIXES = ("model.layers.{}.", "layers.{}.")
"""How a layer's tensors begin in a checkpoint: of the causal model, or of the bare one."""

_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_STRETCHED_ROPE_TYPES = ("llama3", "yarn", "longrope")
_LENGTH_BEFORE = "original_max_position_embeddings"


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the layer depends on. Raises ConfigError naming the field."""
    hidden = fields.size(raw, "hidden_size")
    heads = fields.size(raw, "num_attention_heads")
    kv_heads = fields.size(raw, "num_key_value_heads", default=heads)
    if raw.get("head_dim") is None:
        fields.divides("num_attention_heads", heads, "hidden_size", hidden)
    fields.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = fields.size(raw, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is not even, as rotary positions need")
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields.size(raw, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": fields.choice(raw, "hidden_act", _ACTIVATIONS),
        "max_position_embeddings": fields.positions(raw, "max_position_embeddings", 2048),
        "rms_norm_eps": fields.positive(raw, "rms_norm_eps", 1e-6),
        "attention_bias": fields.flag(raw, "attention_bias"),
        "mlp_bias": fields.flag(raw, "mlp_bias"),
        "rope_parameters": _rope_parameters(raw),
    }


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as one object, from today's `rope_parameters` or the older `rope_scaling`.

    Fields that stand beside it are part of it, by transformers' rules (`RotaryEmbeddingConfigMixin`
    of 5.24): `rope_theta` and `partial_rotary_factor` where it lacks them; the length before
    scaling over what it has, and without either all positions.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters {str(given)[:40]!r} is not an object")
    rest = {key: value for key, value in given.items() if key not in ("type", "rope_theta")}
    kind = {"rope_type": given.get("rope_type", given.get("type"))}
    theta = fields.positive(raw, "rope_theta", 10000.0)
    found = rest | {
        "rope_type": fields.choice(kind, "rope_type", _ROPE_TYPES),
        "rope_theta": fields.positive(given, "rope_theta", theta),
    }
    if raw.get("partial_rotary_factor") is not None:
        factor = fields.positive(raw, "partial_rotary_factor", 1.0)
        found.setdefault("partial_rotary_factor", factor)
    if found["rope_type"] in _STRETCHED_ROPE_TYPES:
        most = fields.positions(raw, "max_position_embeddings", 2048)
        inside = fields.positions(given, _LENGTH_BEFORE, most)
        found[_LENGTH_BEFORE] = fields.positions(raw, _LENGTH_BEFORE, inside)
    return found


def outline(values: Mapping[str, Any]) -> LayerOutline:
    """Parameter names as in `LlamaDecoderLayer`; keys and values of each group of heads."""
    cache = CacheGeometry(values["num_key_value_heads"], values["head_dim"], values["head_dim"])
    return LayerOutline(values["hidden_size"], _tensor_shapes(values), cache)


def _tensor_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = values["hidden_size"], values["intermediate_size"]
    queries = values["num_attention_heads"] * values["head_dim"]
    keys = values["num_key_value_heads"] * values["head_dim"]
    linears = {
        "self_attn.q_proj": (queries, hidden, values["attention_bias"]),
        "self_attn.k_proj": (keys, hidden, values["attention_bias"]),
        "self_attn.v_proj": (keys, hidden, values["attention_bias"]),
        "self_attn.o_proj": (hidden, queries, values["attention_bias"]),
        "mlp.gate_proj": (ffn, hidden, values["mlp_bias"]),
        "mlp.up_proj": (ffn, hidden, values["mlp_bias"]),
        "mlp.down_proj": (hidden, ffn, values["mlp_bias"]),
    }
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes | {"post_attention_layernorm.weight": (hidden,)}


def widths(values: Mapping[str, Any]) -> Widths:
    """Of what the layer computes for each token."""
    head_dim = values["head_dim"]
    return Widths(
        queries=values["num_attention_heads"] * head_dim,
        keys=values["num_key_value_heads"] * head_dim,
        inner=values["intermediate_size"],
        positions=head_dim // 2,
    )
