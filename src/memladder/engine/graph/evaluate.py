"""What a canonical graph computes, in plain PyTorch and one matrix a node: the reference for all
that is made of it. Weights are read one at a time; scores are kept whole: it is for narrow layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.engine.graph.nodes import (
    Attention,
    ByColumn,
    Columns,
    Concat,
    Graph,
    Input,
    Linear,
    Mean,
    Node,
    Norm,
    Pointwise,
    Rotary,
    between,
    consumers,
)
from memladder.kernels.functions import FUNCTIONS


def evaluate(graph: Graph, states: Tensor) -> Tensor:
    """float32 [batch_size, seq_len, hidden_size] to the same."""
    size = (graph.shape.batch_size, graph.shape.seq_len, graph.input.columns)
    assert tuple(states.shape) == size
    uses = {name: len(readers) for name, readers in consumers(graph).items()}
    values = {id(graph.input): states.float().reshape(-1, graph.input.columns)}
    for node in graph.nodes():
        if not isinstance(node, Input):
            values[id(node)] = apply(node, [values[id(x)] for x in node.inputs], graph.shape)
        for x in node.inputs:
            uses[id(x)] -= 1
            if not uses[id(x)]:
                values.pop(id(x), None)
    return values[id(graph.output)].view(size)


def evaluate_from(node: Node, leaf: Node, values: Tensor) -> Tensor:
    """The node's value where the leaf's is known; nothing else may be needed."""
    known = {id(leaf): values}
    for other in between(node, leaf):
        inputs = [known[id(x)] for x in other.inputs]
        known[id(other)] = apply(other, inputs, Workload(1, len(values)))
    return known[id(node)]


def apply(node: Node, inputs: list[Tensor], shape: Workload) -> Tensor:
    """One node on its inputs' values, in their dtype."""
    return _KINDS[type(node)](node, inputs, shape)


def _linear(node: Linear, inputs: list[Tensor], shape: Workload) -> Tensor:
    weight = torch.from_numpy(node.weight.block(0, node.columns))
    found = inputs[0] @ weight.to(inputs[0].dtype).T
    return found if node.bias is None else found + _vector(node.bias, found)


def _norm(node: Norm, inputs: list[Tensor], shape: Workload) -> Tensor:
    x = _grouped(inputs[0], node.group)
    if node.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + node.eps)
    found = x.flatten(1)
    found = found if node.weight is None else found * _vector(node.weight, found)
    return found if node.bias is None else found + _vector(node.bias, found)


def _pointwise(node: Pointwise, inputs: list[Tensor], shape: Workload) -> Tensor:
    operands = (x.double().numpy() for x in inputs)
    found = FUNCTIONS[node.function](*operands, *node.numbers)
    return torch.from_numpy(found).to(inputs[0].dtype)


def _by_column(node: ByColumn, inputs: list[Tensor], shape: Workload) -> Tensor:
    found = inputs[0]
    found = found if node.factor is None else found * _vector(node.factor, found)
    return found if node.offset is None else found + _vector(node.offset, found)


def _mean(node: Mean, inputs: list[Tensor], shape: Workload) -> Tensor:
    found: Tensor = _grouped(inputs[0], node.group).mean(dim=-1)
    return found


def _columns(node: Columns, inputs: list[Tensor], shape: Workload) -> Tensor:
    return inputs[0][:, torch.from_numpy(np.array(node.index))]


def _concat(node: Concat, inputs: list[Tensor], shape: Workload) -> Tensor:
    return torch.cat(inputs, dim=1)


def _rotary(node: Rotary, inputs: list[Tensor], shape: Workload) -> Tensor:
    positions = torch.arange(shape.seq_len).repeat(shape.batch_size)
    angles = positions.double().outer(_vector(node.frequencies, positions.double())).unsqueeze(1)
    cos, sin = angles.cos().to(inputs[0].dtype), angles.sin().to(inputs[0].dtype)
    low, high = _grouped(inputs[0], node.head_dim).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(1)


def _attention(node: Attention, inputs: list[Tensor], shape: Workload) -> Tensor:
    def heads(x: Tensor, count: int) -> Tensor:
        found = x.view(shape.batch_size, shape.seq_len, count, -1).transpose(1, 2)
        return found.repeat_interleave(node.heads // count, dim=1)

    query = heads(inputs[0], node.heads)
    key, value = (heads(x, node.kv_heads) for x in inputs[1:])
    scores = query @ key.transpose(-1, -2) * node.scale
    if node.softcap is not None:
        scores = node.softcap * torch.tanh(scores / node.softcap)
    places = torch.arange(shape.seq_len)
    distance = places - places.unsqueeze(1)
    if node.slopes is not None:
        scores = scores + _vector(node.slopes, scores).view(-1, 1, 1) * distance
    hidden = distance > 0
    if node.window is not None:
        hidden |= distance <= -node.window
    scores = scores.masked_fill(hidden, -torch.inf)
    found = scores.softmax(dim=-1) @ value
    return found.transpose(1, 2).reshape(shape.tokens, -1)


def _grouped(x: Tensor, group: int) -> Tensor:
    return x.reshape(len(x), -1, group)


def _vector(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(numbers)).to(like.dtype)


_KINDS: Mapping[type[Node], Callable[[Any, list[Tensor], Workload], Tensor]] = {
    Linear: _linear,
    Norm: _norm,
    Pointwise: _pointwise,
    ByColumn: _by_column,
    Mean: _mean,
    Columns: _columns,
    Concat: _concat,
    Rotary: _rotary,
    Attention: _attention,
}
