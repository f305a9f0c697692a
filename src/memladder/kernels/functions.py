"""Functions of elements: the one table of them.

Graphs name them (`Pointwise.function`), the canonical graph is evaluated by their meaning, chains
of ONNX operators are recognised by it, and each one that `pointwise` computes has a PyTorch twin
(`naive/rows.py`) and a Triton twin (`cuda/pointwise.py`); tests hold both against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_ERF = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True)
class Function:
    """`meaning` takes `operands` float64 arrays of one shape, then `numbers` floats, to an array of
    that shape; NaN and infinity as IEEE 754 has them.

    `follows_product`: a product applies it to its sums before they are stored. `has_kernel`:
    `pointwise` computes it. `has_kink`: its derivative jumps at a number that is meant.
    """

    meaning: Callable[..., Array]
    operands: int = 1
    numbers: int = 0
    follows_product: bool = False
    has_kernel: bool = True
    has_kink: bool = False

    def __post_init__(self) -> None:
        if self.follows_product and (self.operands, self.numbers) != (1, 0):
            raise ValueError("a product applies functions of one operand alone")

    def __call__(self, *values: Array | float) -> Array:
        """The meaning of the operands, then the numbers."""
        assert len(values) == self.operands + self.numbers
        with np.errstate(all="ignore"):
            found: Array = self.meaning(*values)
        return found

    @property
    def is_recognised(self) -> bool:
        """Whether a chain of elementwise operators may turn out to be it: functions of one operand
        that kernels compute."""
        return self.has_kernel and (self.operands, self.numbers) == (1, 0)


def _erf(x: Array) -> Array:
    return np.asarray(_ERF(x), np.float64)


def _gelu_tanh(x: Array) -> Array:
    found: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return found


FUNCTIONS: Mapping[str, Function] = {
    "add": Function(np.add, operands=2),
    "mul": Function(np.multiply, operands=2),
    "div": Function(np.divide, operands=2, has_kernel=False),
    "plus": Function(np.add, numbers=1),
    "scale": Function(np.multiply, numbers=1),
    "pow": Function(np.power, numbers=1, has_kernel=False),
    "clip": Function(np.clip, numbers=2, has_kink=True),
    # Hendrycks and Gimpel 2016 (arXiv:1606.08415): the logistic function's, erf's, tanh's, and
    # the quick approximation.
    "silu": Function(lambda x: x / (1 + np.exp(-x)), follows_product=True),
    "gelu": Function(lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2, follows_product=True),
    "gelu_tanh": Function(_gelu_tanh, follows_product=True),
    "quick_gelu": Function(lambda x: x / (1 + np.exp(-1.702 * x))),
    "relu": Function(lambda x: np.maximum(x, 0), follows_product=True, has_kink=True),
    # So et al. 2021, "Primer" (arXiv:2109.08668).
    "relu_squared": Function(lambda x: np.square(np.maximum(x, 0)), has_kink=True),
    "sigmoid": Function(lambda x: 1 / (1 + np.exp(-x))),
    "tanh": Function(np.tanh),
    "erf": Function(_erf, has_kernel=False),
    "exp": Function(np.exp, has_kernel=False),
    "log": Function(np.log, has_kernel=False),
    "sqrt": Function(np.sqrt, has_kernel=False),
    "reciprocal": Function(np.reciprocal, has_kernel=False),
    "abs": Function(np.abs, has_kernel=False, has_kink=True),
    "softplus": Function(lambda x: np.logaddexp(0, x), has_kernel=False),
}


def has_kernel(name: str) -> bool:
    """Whether `pointwise` computes that function."""
    return name in FUNCTIONS and FUNCTIONS[name].has_kernel


def follows_product(name: str) -> bool:
    """Whether a product applies it; "" stands for none."""
    return not name or (name in FUNCTIONS and FUNCTIONS[name].follows_product)
