"""Functions of elements against PyTorch's, their twins against the table; norms of heads."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction, signature

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memladder.kernels import cuda, naive
from memladder.kernels.functions import FUNCTIONS, Function, follows_product, has_kernel
from memladder.kernels.naive import rows as naive_rows
from tests.unit.kernels.test_cuda import error, normal, poisoned, run

# By PyTorch, in float64; the last three by their definitions.
DEFINED: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "plus": torch.add,
    "scale": torch.mul,
    "pow": torch.pow,
    "clip": torch.clamp,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "softplus": functional.softplus,
    "reciprocal": lambda x: 1 / x,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
}
NUMBERS = {"plus": (0.75,), "scale": (0.75,), "clip": (-0.5, 0.75), "pow": (3.0,)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_meaning(name: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    x = np.sort(halves[np.isfinite(halves)]).reshape(-1, 4)
    operands = [x, x[::-1].copy()][: FUNCTIONS[name].operands]
    expected = DEFINED[name](*map(torch.tensor, operands), *NUMBERS.get(name, ()))
    found = FUNCTIONS[name](*operands, *NUMBERS.get(name, ()))
    assert found.dtype == np.float64
    # PyTorch's softplus is the identity beyond 20; its functions of large negative numbers are 0
    # where the exponential is below 1e-15.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-8, atol=1e-15)


def test_a_table_of_functions_is_whole() -> None:
    assert DEFINED.keys() == FUNCTIONS.keys()
    assert set(naive_rows.TWINS) == {name for name in FUNCTIONS if has_kernel(name)}
    assert {name for name in FUNCTIONS if follows_product(name)} < set(naive_rows.TWINS)
    assert follows_product("")
    assert not has_kernel("")
    assert not follows_product("sine")
    with pytest.raises(ValueError, match="one operand alone"):
        Function(np.add, operands=2, follows_product=True)


def test_naive_kernels_are_the_list_of_kernels() -> None:
    """Each has a Triton twin, with the same arguments."""
    named = {name for name, value in vars(naive).items() if isfunction(value)}
    twins = {name for name, value in vars(cuda).items() if isfunction(value)}
    assert named == twins - {"has_wgmma"}
    for name in named:
        arguments = [
            [(one.name, one.kind, one.default) for one in signature(found).parameters.values()]
            for found in (getattr(naive, name), getattr(cuda, name))
        ]
        assert arguments[0] == arguments[1], name


@pytest.mark.parametrize("function", list(filter(has_kernel, FUNCTIONS)))
@pytest.mark.parametrize("kernels", [naive, cuda], ids=["naive", "triton"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 333), (3, 1024)])
def test_functions(function: str, kernels: object, rows: int, columns: int) -> None:
    x, other = normal(rows, columns).half(), normal(rows, columns, seed=1).half()
    known, numbers = FUNCTIONS[function], NUMBERS.get(function, ())
    beside = {"other": other} if known.operands == 2 else {}
    found = poisoned(rows, columns)
    options = {
        "function": function,
        **beside,
        **dict(zip(("number", "most"), numbers, strict=False)),
    }
    run(kernels.pointwise, x, found, **options)  # type: ignore[attr-defined]
    operands = (part.double().numpy() for part in (x, *beside.values()))
    expected = torch.from_numpy(known(*operands, *numbers))
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
