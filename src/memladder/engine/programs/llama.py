"""LLaMA's layer: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memladder.case import Shape
from memladder.engine.program import Program
from memladder.engine.programs.build import CHUNK, Attention, Builder, attention_block, mlp_block
from memladder.engine.sources import Matrix, Source, Vector
from memladder.errors import UnavailableError
from memladder.formats.base import Format
from memladder.models.llama import tensor_shapes

_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
STORED = tuple(_LINEARS[name] for name in ("query", "key", "value"))
"""Modules whose output the program keeps; the others' is changed before it is written."""
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Those whose angles depend neither on the sequence's length nor scale the attention.
_ROPE_TYPES = ("default", "linear", "llama3")


def matrices(values: Mapping[str, Any]) -> dict[str, Matrix]:
    """By the engine's names."""
    shapes = tensor_shapes(values)
    sources = {name: f"{linear}.weight" for name, linear in _LINEARS.items()}
    found = {}
    for name, tensor in sources.items():
        rows, columns = shapes[tensor]
        found[name] = Matrix(rows, columns, Source(tensor))
    return found


def vectors(values: Mapping[str, Any]) -> dict[str, Vector]:
    """Norms, and biases where the configuration has them."""
    shapes = tensor_shapes(values)
    sources = _NORMS | {f"{name}.bias": f"{linear}.bias" for name, linear in _LINEARS.items()}
    return {
        name: Vector(shapes[tensor][0], Source(tensor))
        for name, tensor in sources.items()
        if tensor in shapes
    }


def constant_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """Angles per position of a head's pairs."""
    return {"rotary.frequencies": values["head_dim"] // 2}


def constants(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """`rotary.frequencies` float32 [head_dim / 2], radians a position, as transformers has them.

    Raises UnavailableError for kinds whose angles depend on the sequence's length.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = values["rope_parameters"]["rope_type"]
    if kind not in _ROPE_TYPES:
        raise UnavailableError(
            f"ladder has no rotary positions of type {kind!r}; it has {', '.join(_ROPE_TYPES)}"
        )
    rotary = LlamaRotaryEmbedding(LlamaConfig(**values))
    assert rotary.attention_scaling == 1.0
    return {"rotary.frequencies": rotary.inv_freq.to(torch.float32)}


def program(
    values: Mapping[str, Any],
    shape: Shape,
    activation: Format | None,
    *,
    chunk: int = CHUNK,
    in_place: bool = True,
) -> Program:
    """The layer at a shape; `activation` is None for fp16."""
    own = matrices(values)
    biases = frozenset(name for name in own if f"{name}.bias" in vectors(values))
    builder = Builder(shape, values["hidden_size"], own, biases, activation, chunk, in_place)
    norm = {"kernel": "rms_norm", "eps": values["rms_norm_eps"]}
    attention = Attention(
        values["num_attention_heads"],
        values["num_key_value_heads"],
        values["head_dim"],
        "rotary",
    )
    attention_block(builder, norm, attention, residual_is_norm=False)
    activation_name = _ACTIVATIONS.get(values["hidden_act"], values["hidden_act"])
    mlp_block(builder, norm, activation_name, gated=True, residual_is_norm=False)
    return builder.program()
