"""The canonical graph: what a layer computes, token by token.

A node's value is a matrix [tokens, columns]. Nodes are immutable and compared by identity; `Nodes`
makes equal ones once, so that a value spelled twice is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import numpy as np

from memladder.core.case import Workload


@dataclass(frozen=True, eq=False)
class Array:
    """A constant of the model: a view of the mapped file, or a small array. Compared by identity.

    `name` says where it comes from.
    """

    name: str
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class Weight:
    """Rows of a stored matrix, all times a factor: [rows, columns] = [out, in].

    `rows` are indices into the stored matrix; nothing is copied before `block` is asked for.
    """

    array: Array
    rows: np.ndarray
    factor: float = 1.0

    @property
    def columns(self) -> int:
        """K."""
        return int(self.array.data.shape[1])

    def block(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop − start, columns], a copy."""
        rows = self.rows[start:stop]
        first = int(rows[0])
        neighbours = bool((np.diff(rows) == 1).all())
        taken = self.array.data[slice(first, first + len(rows)) if neighbours else rows]
        found = np.array(taken, dtype=np.float32, order="C")
        return found if self.factor == 1.0 else found * np.float32(self.factor)


Vector: TypeAlias = np.ndarray
"""float32, a number a column."""


@dataclass(frozen=True, eq=False)
class Node:
    """`columns` values a token. `source` names the ONNX node that it comes from."""

    columns: int
    source: str

    def __post_init__(self) -> None:
        depth = 1 + max((node.depth for node in self.inputs), default=0)
        object.__setattr__(self, "_depth", depth)

    @property
    def depth(self) -> int:
        """Nodes of the longest way from the input to this one: more than any node that it needs
        has."""
        found: int = vars(self)["_depth"]
        return found

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Nodes that it reads."""
        return ()


@dataclass(frozen=True, eq=False)
class Input(Node):
    """The hidden states."""


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """x · Wᵀ + bias."""

    x: Node
    weight: Weight
    bias: Vector | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """`rms` or `layer`, over each `group` neighbouring columns; then · weight + bias."""

    x: Node
    kind: str
    group: int
    eps: float
    weight: Vector | None = None
    bias: Vector | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Pointwise(Node):
    """A function of each element of one or two operands; `numbers` are its parameters.

    `function` is a key of `kernels.functions.FUNCTIONS`.
    """

    function: str
    operands: tuple[Node, ...]
    numbers: tuple[float, ...] = ()

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The operands."""
        return self.operands


@dataclass(frozen=True, eq=False)
class ByColumn(Node):
    """x · factor + offset, both by column."""

    x: Node
    factor: Vector | None
    offset: Vector | None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Mean(Node):
    """The mean of each `group` neighbouring columns."""

    x: Node
    group: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Columns(Node):
    """A choice of columns that could not be made a choice of a weight's rows."""

    x: Node
    index: np.ndarray

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Columns of all parts, one part after the other."""

    parts: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The parts."""
        return self.parts


@dataclass(frozen=True, eq=False)
class Rotary(Node):
    """Every head rotated by its token's position: element i is paired with i + head_dim / 2.

    `frequencies` [head_dim / 2], radians a position; 0 leaves a pair as it is.
    """

    x: Node
    head_dim: int
    frequencies: Vector

    @property
    def inputs(self) -> tuple[Node, ...]:
        """x."""
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Attention(Node):
    """Causal softmax(scale · q · kᵀ + slope · (key − query)) · v by heads.

    Query head h reads key and value head h · kv_heads / heads. `window`: a token sees so many,
    itself among them. `softcap` c: scores become c · tanh(score / c). Heads of values may have
    another size than heads of queries and keys.
    """

    query: Node
    key: Node
    value: Node
    heads: int
    kv_heads: int
    scale: float
    slopes: Vector | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Query, key and value."""
        return (self.query, self.key, self.value)


AnyNode = TypeVar("AnyNode", bound=Node)


class Nodes:
    """Makes nodes; asked for the same one again it gives the one that it has."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Node] = {}

    def __call__(self, node: AnyNode) -> AnyNode:
        """`node`, or its equal that was there before."""
        key = (type(node), *(_key(getattr(node, f.name)) for f in fields(node)[2:]))
        known = self._known.setdefault((node.columns, *key), node)
        assert isinstance(known, type(node))
        return known


def _key(value: Any) -> Any:
    """Nodes and stored arrays by identity, vectors and indices by their numbers."""
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, Weight):
        return id(value.array), value.rows.tobytes(), value.factor
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    return id(value) if isinstance(value, Node) else value


@dataclass(frozen=True, eq=False)
class Graph:
    """A layer at a shape: one output, of the input's size."""

    shape: Workload
    input: Node
    output: Node

    def nodes(self) -> Iterator[Node]:
        """Each node that the output needs once, after all that it reads; the order is a function
        of the graph alone."""
        return iter(ordered(self.output))


def ordered(output: Node) -> list[Node]:
    """The node and all that it needs, each after its inputs."""
    found: dict[int, Node] = {}
    stack = [(output, False)]
    while stack:
        node, ready = stack.pop()
        if id(node) in found:
            continue
        if ready:
            found[id(node)] = node
        else:
            stack.append((node, True))
            stack.extend((other, False) for other in reversed(node.inputs))
    return list(found.values())


def between(node: Node, leaf: Node) -> list[Node]:
    """`node` and all that it needs, each after its inputs, up to the leaf, through which all ways
    to it go."""
    found: dict[int, Node] = {}
    stack = [node]
    while stack:
        other = stack.pop()
        if other is not leaf and id(other) not in found:
            found[id(other)] = other
            stack.extend(other.inputs)
    return sorted(found.values(), key=lambda other: other.depth)


def consumers(graph: Graph) -> dict[int, list[Node]]:
    """By a node's id: who reads it, as often as it does."""
    found: dict[int, list[Node]] = {id(node): [] for node in graph.nodes()}
    for node in graph.nodes():
        for other in node.inputs:
            found[id(other)].append(node)
    return found
