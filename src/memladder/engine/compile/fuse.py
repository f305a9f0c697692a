"""Canonical nodes joined to what one kernel computes.

A product takes its bias, activation and residual along; gate and up of a gated MLP are one; query,
key and value of the same rows are one, with their rotation. Values in between never reach global
memory.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from memladder.core.errors import GraphError
from memladder.engine.graph.fused import Fused, Glu, NamedNorm, Parameters, Product
from memladder.engine.graph.nodes import (
    Attention,
    Graph,
    Linear,
    Node,
    Norm,
    Pointwise,
    Rotary,
    Weight,
    consumers,
    ordered,
)
from memladder.kernels import functions

Result = TypeVar("Result")
Making: TypeAlias = Generator[Node, Any, Result]
"""A rule at work: it yields nodes of the graph, and is sent what they have become."""

# Two float32 numbers that are meant to be one.
_ROUNDED = 5e-7


def fuse(graph: Graph) -> tuple[Fused, Parameters]:
    """Kernels for a canonical graph, and what they read.

    Raises GraphError, naming the node, for what no kernel computes.
    """
    return _Fuser(graph).fused()


class _Fuser:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._readers = consumers(graph)
        self._matrices: dict[str, Weight] = {}
        self._vectors: dict[str, np.ndarray] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._made: dict[int, Node] = {id(graph.input): graph.input}
        self._attention: Attention | None = None
        self._projected: tuple[Product, ...] = ()
        self._rotated = False
        self._projections: dict[int, str] = {}
        # What queries, keys and values are projected from.
        self._projected_from: set[int] = set()
        for node in graph.nodes():
            if isinstance(node, Attention):
                for name, operand in zip(("query", "key", "value"), node.inputs, strict=True):
                    linear = _projection(operand)
                    if linear is not None:
                        self._projections[id(linear)] = name
                        self._projected_from.add(id(linear.x))

    def fused(self) -> tuple[Fused, Parameters]:
        """All of the graph."""
        output = self._made_of(self._graph.output)
        fused = Fused(
            self._graph.input,
            output,
            self._attention,
            self._projected,
            self._rotated,
            {name: (len(weight.rows), weight.columns) for name, weight in self._matrices.items()},
            {name: len(vector) for name, vector in self._vectors.items()},
            {name: len(constant) for name, constant in self._constants.items()},
        )
        return fused, Parameters(self._matrices, self._vectors, self._constants)

    def _made_of(self, node: Node) -> Node:
        """What a node becomes. Depth first, so that names and steps are in the order of need; each
        rule asks for what it reads by yielding it, since a graph may be deeper than Python's stack.
        """
        waiting: list[tuple[Node, Making[Node]]] = []
        wanted = node
        while True:
            found = self._made.get(id(wanted))
            if found is None:
                rule = _RULES.get(type(wanted))
                if rule is None:
                    kind = type(wanted).__name__.lower()
                    raise GraphError(f"no kernel for {kind} {wanted.source!r}")
                waiting.append((wanted, rule(self, wanted)))
            elif not waiting:
                return found
            try:
                wanted = waiting[-1][1].send(found)
            except StopIteration as done:
                wanted, _ = waiting.pop()
                self._made[id(wanted)] = done.value

    def _alone(self, node: Node) -> bool:
        return len(self._readers[id(node)]) == 1

    def _linear(
        self, node: Linear, activation: str = "", residual: Node | None = None
    ) -> Making[Product]:
        """`residual` was made already."""
        x = yield node.x
        name = self._matrix(node, self._role(node))
        return Product(node.columns, node.source, x, name, activation, residual)

    def _role(self, node: Linear) -> str:
        """What the field calls that product, or `linear`."""
        if id(node) in self._projections:
            return self._projections[id(node)]
        if isinstance(node.x, Attention):
            return "output"
        if _is_inner(node.x):
            return "down"
        return "up" if any(_is_inner(reader) for reader in self._readers[id(node)]) else "linear"

    def _matrix(self, node: Linear, stem: str) -> str:
        name = _free(stem, self._matrices)
        self._matrices[name] = node.weight
        if node.bias is not None:
            self._vectors[f"{name}.bias"] = node.bias
        return name

    def _pointwise(self, node: Pointwise) -> Making[Node]:
        if node.function == "add":
            total = yield from self._sum(node)
            if total is not None:
                return total
        if node.function == "mul":
            for gate, up in (node.operands, node.operands[::-1]):
                found = self._activated(gate)
                if (
                    found is not None
                    and isinstance(up, Linear)
                    and self._alone(gate)
                    and self._alone(up)
                    and found[0].x is up.x
                    and found[0].columns == up.columns
                    and (found[0].bias is None) == (up.bias is None)
                ):
                    x = yield up.x
                    names = self._matrix(found[0], "gate"), self._matrix(up, "up")
                    return Glu(node.columns, node.source, x, *names, found[1])
        activated = self._activated(node)
        if activated is not None:
            return (yield from self._linear(*activated))
        if not functions.has_kernel(node.function):
            raise GraphError(f"no kernel for {node.function} {node.source!r}")
        operands = []
        for operand in node.operands:
            operands.append((yield operand))
        return replace(node, operands=tuple(operands))

    def _sum(self, node: Pointwise) -> Making[Node | None]:
        """Products that are added up: each takes what was added before it as its residual."""
        addends = self._addends(node)
        last = {id(a) for a in addends if self._alone(a) and self._activated(a) is not None}
        if not last or len(addends) < 2:
            return None
        order = {id(other): i for i, other in enumerate(ordered(node))}
        addends.sort(key=lambda addend: order[id(addend)])
        rest = []
        for addend in addends:
            if id(addend) not in last:
                rest.append((yield addend))
        total = rest[0] if rest else None
        for other in rest[1:]:
            assert total is not None
            total = Pointwise(node.columns, node.source, "add", (total, other))
        for addend in addends:
            activated = self._activated(addend)
            if id(addend) in last and activated is not None:
                total = yield from self._linear(*activated, residual=total)
        return total

    def _addends(self, node: Node) -> list[Node]:
        """The addends of the node's sum."""
        parts: list[Node] = []
        stack = [node]
        while stack:
            part = stack.pop()
            inner = isinstance(part, Pointwise) and part.function == "add"
            if inner and (part is node or self._alone(part)):
                stack.extend(reversed(part.inputs))
            else:
                parts.append(part)
        return parts

    def _activated(self, node: Node) -> tuple[Linear, str] | None:
        """The linear layer under an activation that a product can apply, or alone."""
        if isinstance(node, Linear):
            return node, ""
        if (
            isinstance(node, Pointwise)
            and functions.follows_product(node.function)
            and isinstance(node.operands[0], Linear)
            and self._alone(node.operands[0])
        ):
            return node.operands[0], node.function
        return None

    def _norm(self, node: Norm) -> Making[NamedNorm]:
        x = yield node.x
        stem = "norm"
        if any(isinstance(reader, Linear) for reader in self._readers[id(node)]):
            stem = "attention_norm" if id(node) in self._projected_from else "mlp_norm"
        name = _free(stem, {key.rpartition(".")[0] for key in self._vectors})
        weight = np.ones(node.columns, np.float32) if node.weight is None else node.weight
        self._vectors[f"{name}.weight"] = self._by_head(node, weight)
        if node.kind == "layer":
            bias = np.zeros(node.columns, np.float32) if node.bias is None else node.bias
            self._vectors[f"{name}.bias"] = self._by_head(node, bias)
        elif node.bias is not None:
            raise GraphError(f"no kernel for a root mean square norm with bias {node.source!r}")
        return NamedNorm(node.columns, node.source, x, node.kind, name, node.group, node.eps)

    @staticmethod
    def _by_head(node: Norm, vector: np.ndarray) -> np.ndarray:
        by_head = vector.reshape(-1, node.group)
        if (by_head != by_head[:1]).any():
            raise GraphError(f"no kernel for a norm with other weights a head {node.source!r}")
        first: np.ndarray = by_head[0]
        return first

    def _rotary(self, node: Rotary) -> Making[Rotary]:
        self._frequencies(node)
        x = yield node.x
        return replace(node, x=x)

    def _frequencies(self, node: Rotary) -> None:
        known = self._constants.setdefault("rotary.frequencies", node.frequencies)
        # Queries' and keys' tables may be rounded differently, after weights of their own.
        same = known.shape == node.frequencies.shape
        if not same or not np.allclose(known, node.frequencies, rtol=_ROUNDED, atol=0):
            raise GraphError(f"no kernel for rotary positions of two kinds {node.source!r}")

    def _attend(self, node: Attention) -> Making[Attention]:
        self._check(node)
        operands = (node.query, node.key, node.value)
        linears = [_projection(operand) for operand in operands]
        first = linears[0]
        if first is not None and all(
            linear is not None
            and linear.x is first.x
            and (linear.bias is None) == (first.bias is None)
            for linear in linears
        ):
            yield from self._project([linear for linear in linears if linear is not None])
            # The kernel rotates what it has made itself.
            rotated = [isinstance(x, Rotary) and isinstance(x.x, Linear) for x in operands]
            self._rotated = rotated == [True, True, False] and isinstance(node.value, Linear)
        if self._rotated:
            made: list[Node] = [*self._projected]
            assert isinstance(node.query, Rotary)
            assert isinstance(node.key, Rotary)
            self._frequencies(node.query)
            self._frequencies(node.key)
        else:
            made = []
            for operand in operands:
                made.append((yield operand))
        if node.slopes is not None:
            self._constants["alibi.slopes"] = node.slopes
        self._attention = replace(node, query=made[0], key=made[1], value=made[2])
        return self._attention

    def _project(self, linears: list[Linear]) -> Making[None]:
        """Query, key and value as products of the same rows."""
        x = yield linears[0].x
        for name, linear in zip(("query", "key", "value"), linears, strict=True):
            product = Product(linear.columns, linear.source, x, self._matrix(linear, name))
            self._projected += (product,)
            self._made[id(linear)] = product

    def _check(self, node: Attention) -> None:
        if self._attention is not None:
            raise GraphError(f"a layer with two attentions: {node.source!r} is the second")
        size = node.query.columns // node.heads
        for what, wrong in (
            ("slopes, a window and a soft cap", node.slopes is not None and _windowed(node)),
            ("values of another head size than keys", node.columns // node.heads != size),
            (f"scale {node.scale}", not np.isclose(node.scale, size**-0.5, rtol=1e-3)),
        ):
            if wrong:
                raise GraphError(f"no kernel for attention with {what}: {node.source!r}")


def _projection(node: Node) -> Linear | None:
    """The linear layer that a query, key or value comes from, by way of norms and rotations."""
    while isinstance(node, Norm | Rotary):
        node = node.x
    return node if isinstance(node, Linear) else None


def _windowed(node: Attention) -> bool:
    return node.window is not None or node.softcap is not None


def _is_inner(node: Node) -> bool:
    """Is it what lies between an MLP's products?"""
    return isinstance(node, Pointwise) and node.function not in ("add", "scale", "plus")


def _free(stem: str, taken: Any) -> str:
    if stem not in taken:
        return stem
    return next(name for i in range(2, len(taken) + 3) if (name := f"{stem}_{i}") not in taken)


_RULES: Mapping[type[Node], Any] = {
    Linear: _Fuser._linear,
    Pointwise: _Fuser._pointwise,
    Norm: _Fuser._norm,
    Rotary: _Fuser._rotary,
    Attention: _Fuser._attend,
}
