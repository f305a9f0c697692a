"""What follows a product before it is stored: scales, bias, activation, residual."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, NAME: tl.constexpr):
    """A function that follows a product (`kernels.functions`); "" stands for none."""
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh z) / 2 is the logistic function of 2z.
        x = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "", "unknown activation")
    return x


@triton.jit
def stored(x, m, n, M, N, residual, out, RESIDUAL: tl.constexpr):
    """Store x + residual, a tile [rows m, columns n] of an output [M, N]."""
    at = m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finished(x, at, n, inside, bias, residual, out, ACTIVATION: tl.constexpr,
             BIAS: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """Store activation(x + bias) + residual; `n` are x's columns, `at` its elements."""
    if BIAS:
        x += tl.load(bias + n).to(tl.float32)
    x = activated(x, ACTIVATION)
    if RESIDUAL:
        x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def power(code, top):
    """2^(code − top) as float32 for E8M0 codes; below 2^-126 it is zero."""
    return (tl.maximum(code.to(tl.int32) - top + 127, 0) << 23).to(tl.float32, bitcast=True)
