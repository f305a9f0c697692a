"""What one kernel computes, as nodes of a graph; and a layer made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memladder.engine.graph.nodes import Attention, Node, Weight


@dataclass(frozen=True, eq=False)
class Product(Node):
    """activation(x · Wᵀ + bias) + residual; the weight by its name."""

    x: Node
    weight: str
    activation: str = ""
    residual: Node | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x and residual."""
        return (self.x,) if self.residual is None else (self.residual, self.x)


@dataclass(frozen=True, eq=False)
class Glu(Node):
    """activation(x · Gᵀ + bias) · (x · Uᵀ + bias)."""

    x: Node
    gate: str
    up: str
    activation: str

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class NamedNorm(Node):
    """A norm whose weight and bias have a name; over heads if `group` is less than all columns."""

    x: Node
    kind: str
    name: str
    group: int
    eps: float

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True)
class Fused:
    """A layer in kernels, at any shape, without its weights: sizes of the matrices [rows, columns],
    fp16 vectors and float32 constants that it reads by name.

    `projected`: query, key and value, where these are products of the same rows, which one kernel
    makes; it rotates queries and keys if they are `rotated`.
    """

    input: Node
    output: Node
    attention: Attention | None
    projected: tuple[Product, ...]
    rotated: bool
    matrices: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, int]
    constants: Mapping[str, int]

    @property
    def hidden_size(self) -> int:
        """Width of input and output."""
        return self.input.columns


@dataclass(frozen=True)
class Parameters:
    """What a fused layer reads, as the model has it: rows of stored matrices, and vectors."""

    matrices: Mapping[str, Weight]
    vectors: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray]
