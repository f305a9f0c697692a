"""BLOOM-176B's decoder layer: LayerNorm, ALiBi, multi-head attention, GELU; biases everywhere.

Source: Workshop et al. 2022, "BLOOM", and the published config.json of bigscience/bloom.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memladder.core.case import Workload
from memladder.models import Widths, fields

if TYPE_CHECKING:
    import torch

TITLE = "BLOOM"

VALUES: Mapping[str, Any] = {
    "model_type": "bloom",
    "hidden_size": 14336,
    "n_head": 112,
    "layer_norm_epsilon": 1e-5,
}

# 6 heads are no power of two, as 112 are not: ALiBi then has two series of slopes.
NARROW: Mapping[str, Any] = {**VALUES, "hidden_size": 384, "n_head": 6}

LAYER_PREFIXES = ("transformer.h.{}.", "h.{}.")
"""How a layer's tensors begin in a checkpoint: of the causal model, or of the bare one."""


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the layer depends on. Raises ConfigError naming the field.

    The published files of the BLOOM family use two spellings of the width and of the heads.
    """
    hidden = fields.size(raw, "hidden_size", "n_embed")
    heads = fields.size(raw, "n_head", "num_attention_heads")
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


def tensor_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter names as in `BloomBlock`; a matrix is [out, in]. The FFN is 4 × hidden wide."""
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


def _hf_config(values: Mapping[str, Any]) -> Any:
    from transformers import BloomConfig

    # BloomBlock knows eager attention only; the name decides which mask BloomModel builds.
    return BloomConfig(**values, attn_implementation="eager")


def require_fixed_positions(values: Mapping[str, Any]) -> None:
    """ALiBi's slopes are the same for all lengths."""


def block(values: Mapping[str, Any]) -> torch.nn.Module:
    """Hugging Face's layer, on the current default device."""
    from transformers.models.bloom.modeling_bloom import BloomBlock

    layer: torch.nn.Module = BloomBlock(_hf_config(values), layer_idx=0)
    return layer


def inputs(
    values: Mapping[str, Any], shape: Workload, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What BloomModel passes besides the hidden states.

    `alibi` is [batch_size · n_head, 1, seq_len]; `mask` is 0 or the dtype's minimum,
    [1, 1, seq_len, seq_len]: the same for each of the batch, so it is kept once.
    """
    import torch
    from transformers.masking_utils import create_causal_mask
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    everything = torch.ones(shape.batch_size, shape.seq_len)
    # Neither a mask of the user's nor a cache; transformers 5.24 gave the latter another name.
    states = torch.empty(1, shape.seq_len, 0, dtype=dtype)
    mask = create_causal_mask(_hf_config(values), states, None, None)
    return {"alibi": build_alibi_tensor(everything, values["n_head"], dtype), "mask": mask}


def call(
    layer: torch.nn.Module, hidden_states: torch.Tensor, passed: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """One pass: [batch_size, seq_len, hidden_size] to the same. The attention is dropped."""
    out: torch.Tensor
    out, _ = layer(hidden_states, alibi=passed["alibi"], attention_mask=passed["mask"])
    return out
