"""Elementwise functions and norms of heads: naive against float64, Triton against naive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memladder.kernels import cuda, naive
from tests.unit.test_kernels_cuda import error, normal, poisoned, run

# By their definitions, in float64.
DEFINED: dict[str, Callable[..., Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
    "plus": lambda x: x + 0.75,
    "scale": lambda x: x * 0.75,
    "clip": lambda x: x.clamp(-0.5, 0.75),
    "add": torch.add,
    "mul": torch.mul,
}
NUMBERS = {
    "plus": {"number": 0.75},
    "scale": {"number": 0.75},
    "clip": {"number": -0.5, "most": 0.75},
}


def test_there_is_no_other_function() -> None:
    assert DEFINED.keys() == naive.FUNCTIONS.keys()


@pytest.mark.parametrize("function", DEFINED)
@pytest.mark.parametrize("kernels", [naive, cuda], ids=["naive", "triton"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 333), (3, 1024)])
def test_functions(function: str, kernels: object, rows: int, columns: int) -> None:
    x, other = normal(rows, columns).half(), normal(rows, columns, seed=1).half()
    beside = {"other": other} if function in ("add", "mul") else {}
    found = poisoned(rows, columns)
    options = {"function": function, **beside, **NUMBERS.get(function, {})}
    run(kernels.pointwise, x, found, **options)  # type: ignore[attr-defined]
    expected = DEFINED[function](x.double(), *(part.double() for part in beside.values()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    # Over the operand itself.
    again = x.clone()
    run(kernels.pointwise, again, again, **options)  # type: ignore[attr-defined]
    assert torch.equal(again, found)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 8), (5, 3, 80), (2, 64, 128)])
def test_norms_of_heads(rows: int, heads: int, size: int) -> None:
    x = normal(rows, heads * size).half()
    weight, bias = normal(size, seed=1).half(), normal(size, seed=2).half()
    by_head = x.double().view(rows, heads, size)
    found = {name: poisoned(rows, heads * size) for name in ("rms", "layer", "rms2", "layer2")}
    naive.rms_norm_heads(x, weight, found["rms"], eps=1e-5)
    naive.layer_norm_heads(x, weight, bias, found["layer"], eps=1e-5)
    run(cuda.rms_norm_heads, x, weight, found["rms2"], eps=1e-5)
    run(cuda.layer_norm_heads, x, weight, bias, found["layer2"], eps=1e-5)
    root = (by_head.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    expected = (by_head / root * weight).flatten(1)
    centred = by_head - by_head.mean(dim=2, keepdim=True)
    root = (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    shifted = (centred / root * weight + bias).flatten(1)
    for name, wanted in (("rms", expected), ("layer", shifted)):
        assert error(found[name], wanted) < 5e-4
        assert error(found[f"{name}2"], found[name]) < 1e-4
