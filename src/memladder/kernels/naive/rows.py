"""Norms, activation quantisation, rotary positions, functions of elements: row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from memladder import formats
from memladder.kernels.functions import FUNCTIONS
from memladder.kernels.naive.blocks import row_blocks

TWINS: Mapping[str, Callable[..., Tensor]] = {
    "silu": lambda x: functional.silu(x, inplace=True),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: torch.relu(x).square(),
    "plus": torch.add,
    "scale": torch.mul,
    "clip": torch.clamp,
    "add": torch.add,
    "mul": torch.mul,
}
"""Of `kernels.functions`: those with a kernel, in PyTorch. The operand may be overwritten."""


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """out = x / √(mean(x²) + eps) · weight, row by row (Zhang and Sennrich 2019).

    x, out [rows, columns], may be the same; weight [columns].
    """
    for part in row_blocks(x):
        values = x[part].float()
        values *= torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
        out[part] = values.mul_(weight.float())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """out = (x − mean(x)) / √(var(x) + eps) · weight + bias, row by row (Ba et al. 2016).

    x, out [rows, columns], may be the same; weight, bias [columns].
    """
    for part in row_blocks(x):
        values = x[part].float()
        values -= values.mean(dim=1, keepdim=True)
        values *= torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
        out[part] = values.mul_(weight.float()).add_(bias.float())


def rms_norm_heads(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """`rms_norm` of every head: x, out [rows, heads · d], may be the same; weight [d]."""
    rms_norm(x.view(-1, len(weight)), weight, out.view(-1, len(weight)), eps=eps)


def layer_norm_heads(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """`layer_norm` of every head: x, out [rows, heads · d], may be the same; weight, bias [d]."""
    layer_norm(x.view(-1, len(weight)), weight, bias, out.view(-1, len(weight)), eps=eps)


def pointwise(
    x: Tensor,
    out: Tensor,
    *,
    function: str,
    other: Tensor | None = None,
    number: float = 0.0,
    most: float = 0.0,
) -> None:
    """out = function(x), or of x and `other`, or of x and `number` (clip: and `most`).

    x, other, out [rows, columns], may be the same. `function` has a kernel.
    """
    numbers = (number, most)[: FUNCTIONS[function].numbers]
    for part in row_blocks(x):
        operands = [x[part].float()] if other is None else [x[part].float(), other[part].float()]
        out[part] = TWINS[function](*operands, *numbers)


def activated(x: Tensor, activation: str) -> Tensor:
    """activation(x), which may be x itself, overwritten; "" stands for none."""
    if not activation:
        return x
    assert FUNCTIONS[activation].follows_product
    return TWINS[activation](x)


def quantise(x: Tensor, codes: Tensor, scales: Tensor, *, format: str) -> None:
    """The rows of x [rows, columns] in an activation format: codes [rows, columns], uint8, or
    float16 for the numbers that they stand for; scales [rows, groups]."""
    kind = formats.get(format)
    for part in row_blocks(x):
        found = kind.quantise(x[part])
        assert found.scales is not None
        wide = codes.dtype == torch.float16
        codes[part] = kind.decode(found.codes) if wide else found.codes
        scales[part] = found.scales


def rotary(
    x: Tensor, frequencies: Tensor, out: Tensor, *, head_dim: int, start: int, seq_len: int
) -> None:
    """Rotate every head by its token's position (Su et al. 2021, in the order of halves: element i
    is paired with i + head_dim / 2).

    x, out [rows, heads · head_dim], may be the same; frequencies float32 [head_dim / 2], radians a
    position. Row i has position (start + i) mod seq_len.
    """
    for part in row_blocks(x):
        positions = torch.arange(part.start, part.stop, device=x.device)
        positions = positions.add_(start).remainder_(seq_len)
        heads = x[part].float().view(part.stop - part.start, -1, head_dim)
        out[part] = rotated(heads, positions, frequencies).flatten(1)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x float32 [..., rows, heads, d], rotated."""
    angles = positions.float().outer(frequencies).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
