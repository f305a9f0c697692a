"""BLOOM's layer: LayerNorm, ALiBi, multi-head attention, GELU; biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memladder.case import Shape
from memladder.engine.program import Program
from memladder.engine.programs.build import CHUNK, Attention, Builder, attention_block, mlp_block
from memladder.engine.sources import Matrix, Source, Vector
from memladder.formats.base import Format

_QKV = "self_attention.query_key_value"
_LINEARS = {
    "output": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
STORED = (_QKV,)
"""Modules whose output the program keeps; the others' is changed before it is written."""
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def matrices(values: Mapping[str, Any]) -> dict[str, Matrix]:
    """By the engine's names: query, key and value are taken apart."""
    hidden = values["hidden_size"]
    found = {
        name: Matrix(hidden, hidden, _part(values, part, "weight"))
        for part, name in enumerate(("query", "key", "value"))
    }
    for name, linear in _LINEARS.items():
        rows = 4 * hidden if name == "up" else hidden
        columns = 4 * hidden if name == "down" else hidden
        found[name] = Matrix(rows, columns, Source(f"{linear}.weight"))
    return found


def vectors(values: Mapping[str, Any]) -> dict[str, Vector]:
    """Norms and biases."""
    hidden = values["hidden_size"]
    found = {
        f"{name}.{leaf}": Vector(hidden, Source(f"{norm}.{leaf}"))
        for name, norm in _NORMS.items()
        for leaf in ("weight", "bias")
    }
    for part, name in enumerate(("query", "key", "value")):
        found[f"{name}.bias"] = Vector(hidden, _part(values, part, "bias"))
    for name, linear in _LINEARS.items():
        rows = 4 * hidden if name == "up" else hidden
        found[f"{name}.bias"] = Vector(rows, Source(f"{linear}.bias"))
    return found


def constant_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """A slope a head."""
    return {"alibi.slopes": values["n_head"]}


def constants(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """`alibi.slopes` float32 [heads].

    Press et al. 2022, "Train Short, Test Long" (arXiv:2108.12409), section 3: the geometric series
    2^(-8/n), 2^(-16/n), …; where the heads are no power of two, the series of the next lower one,
    then every second of the next higher one.
    """
    heads = values["n_head"]
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return {"alibi.slopes": torch.tensor(slopes, dtype=torch.float32)}


def program(
    values: Mapping[str, Any],
    shape: Shape,
    activation: Format | None,
    *,
    chunk: int = CHUNK,
    in_place: bool = True,
) -> Program:
    """The layer at a shape; `activation` is None for fp16."""
    hidden, heads = values["hidden_size"], values["n_head"]
    own = matrices(values)
    builder = Builder(shape, hidden, own, frozenset(own), activation, chunk, in_place)
    norm = {"kernel": "layer_norm", "eps": values["layer_norm_epsilon"]}
    attention = Attention(heads, heads, hidden // heads, "alibi")
    after_norm = values["apply_residual_connection_post_layernorm"]
    attention_block(builder, norm, attention, residual_is_norm=after_norm)
    mlp_block(builder, norm, "gelu_tanh", gated=False, residual_is_norm=after_norm)
    return builder.program()


def _part(values: Mapping[str, Any], part: int, leaf: str) -> Source:
    """Query, key or value: of each head's rows in turn."""
    head_dim = values["hidden_size"] // values["n_head"]
    return Source(f"{_QKV}.{leaf}", parts=3, part=part, block=head_dim)
