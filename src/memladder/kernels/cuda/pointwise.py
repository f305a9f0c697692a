"""Functions of elements, and norms of heads: what no product's epilogue takes along."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.epilogue import activated
from memladder.kernels.cuda.rows import layer_norm, rms_norm
from memladder.kernels.cuda.target import overlap, wait

_BLOCK = 1024


@triton.jit
def _pointwise(x, other, out, count, number, most, FUNCTION: tl.constexpr, OTHER: tl.constexpr,
               PDL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    wait(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if OTHER:
        second = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    if FUNCTION == "add":
        values += second
    elif FUNCTION == "mul":
        values *= second
    elif FUNCTION == "plus":
        values += number
    elif FUNCTION == "scale":
        values *= number
    elif FUNCTION == "clip":
        values = tl.clamp(values, number, most, propagate_nan=tl.PropagateNan.ALL)
    elif FUNCTION == "sigmoid":
        values = tl.sigmoid(values)
    elif FUNCTION == "tanh":
        values = 2.0 * tl.sigmoid(2.0 * values) - 1.0
    elif FUNCTION == "quick_gelu":
        values *= tl.sigmoid(1.702 * values)
    elif FUNCTION == "relu_squared":
        values = tl.maximum(values, 0.0)
        values *= values
    else:
        values = activated(values, FUNCTION)
    tl.store(out + at, values.to(tl.float16), mask=inside)


def pointwise(
    x: Tensor,
    out: Tensor,
    *,
    function: str,
    other: Tensor | None = None,
    number: float = 0.0,
    most: float = 0.0,
) -> None:
    """The twin of `naive.pointwise`."""
    count = x.numel()
    beside = x if other is None else other
    _pointwise[(triton.cdiv(count, _BLOCK),)](
        x, beside, out, count, number, most,
        FUNCTION=function, OTHER=other is not None, BLOCK=_BLOCK, **overlap(),
    )  # fmt: skip


def rms_norm_heads(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """The twin of `naive.rms_norm_heads`."""
    size = len(weight)
    rms_norm(x.view(-1, size), weight, out.view(-1, size), eps=eps)


def layer_norm_heads(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """The twin of `naive.layer_norm_heads`."""
    size = len(weight)
    layer_norm(x.view(-1, size), weight, bias, out.view(-1, size), eps=eps)
