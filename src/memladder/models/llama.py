"""LLaMA-2-70B's decoder layer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al. 2023, "Llama 2", and the published config.json of Llama-2-70b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memladder.core.case import Workload
from memladder.core.errors import ConfigError, UnavailableError
from memladder.models import Widths, fields

if TYPE_CHECKING:
    import torch

TITLE = "LLAMA"

VALUES: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

NARROW: Mapping[str, Any] = {
    **VALUES,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

LAYER_PREFIXES = ("model.layers.{}.", "layers.{}.")
"""How a layer's tensors begin in a checkpoint: of the causal model, or of the bare one."""

_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_FIXED_ROPE_TYPES = ("default", "linear", "llama3")


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the layer depends on. Raises ConfigError naming the field."""
    hidden = fields.size(raw, "hidden_size")
    heads = fields.size(raw, "num_attention_heads")
    kv_heads = fields.size(raw, "num_key_value_heads", default=heads)
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
        "max_position_embeddings": fields.size(raw, "max_position_embeddings", default=2048),
        "rms_norm_eps": fields.positive(raw, "rms_norm_eps", 1e-6),
        "attention_bias": fields.flag(raw, "attention_bias"),
        "mlp_bias": fields.flag(raw, "mlp_bias"),
        "rope_parameters": _rope_parameters(raw),
    }


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as one object, from today's `rope_parameters` or the older `rope_scaling`."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters {str(given)[:40]!r} is not an object")
    rest = {key: value for key, value in given.items() if key not in ("type", "rope_theta")}
    kind = {"rope_type": given.get("rope_type", given.get("type"))}
    theta = fields.positive(raw, "rope_theta", 10000.0)
    return rest | {
        "rope_type": fields.choice(kind, "rope_type", _ROPE_TYPES),
        "rope_theta": fields.positive(given, "rope_theta", theta),
    }


def tensor_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter names as in `LlamaDecoderLayer`; a matrix is [out, in]."""
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


def require_fixed_positions(values: Mapping[str, Any]) -> None:
    """Raise UnavailableError where angles depend on the sequence's length, or scale attention."""
    kind = values["rope_parameters"]["rope_type"]
    if kind not in _FIXED_ROPE_TYPES:
        raise UnavailableError(
            f"ladder has no rotary positions of type {kind!r}; it has "
            f"{', '.join(_FIXED_ROPE_TYPES)}"
        )


def widths(values: Mapping[str, Any]) -> Widths:
    """Of what the layer computes for each token."""
    head_dim = values["head_dim"]
    return Widths(
        queries=values["num_attention_heads"] * head_dim,
        keys=values["num_key_value_heads"] * head_dim,
        inner=values["intermediate_size"],
        positions=head_dim // 2,
    )


def _hf_config(values: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    # SDPA with `is_causal` is what LlamaModel runs by default: it passes no mask then.
    return LlamaConfig(**values, attn_implementation="sdpa")


def block(values: Mapping[str, Any]) -> torch.nn.Module:
    """Hugging Face's layer, on the current default device."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    layer: torch.nn.Module = LlamaDecoderLayer(_hf_config(values), layer_idx=0)
    return layer


def inputs(
    values: Mapping[str, Any], shape: Workload, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What LlamaModel passes besides the hidden states: `cos`, `sin` [1, seq_len, head_dim]."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(shape.seq_len).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(_hf_config(values))
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions)
    return {"cos": cos, "sin": sin}


def call(
    layer: torch.nn.Module, hidden_states: torch.Tensor, passed: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """One pass: [batch_size, seq_len, hidden_size] to the same."""
    out: torch.Tensor = layer(
        hidden_states,
        attention_mask=None,
        position_embeddings=(passed["cos"], passed["sin"]),
    )
    return out
