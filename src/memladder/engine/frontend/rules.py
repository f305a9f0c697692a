"""Rewriting a graph until each function is one node, however it is spelled: activations and norms.

A rule looks at one node whose inputs were rewritten before; it gives a better node, or None. What
a chain of elementwise operators and means is, is found by what it computes: `probes` evaluates it
in float64 and compares it with the functions of a table. So it does not matter whether a cube is a
power or two products, or in which order numbers are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from memladder.engine.frontend import probes
from memladder.engine.graph.evaluate import evaluate_from
from memladder.engine.graph.nodes import (
    Attention,
    ByColumn,
    Columns,
    Graph,
    Linear,
    Mean,
    Node,
    Nodes,
    Norm,
    Pointwise,
    Rotary,
    between,
)
from memladder.kernels.functions import FUNCTIONS

# Two float32 numbers, multiplied, are this near to what was meant.
_ROUNDED = 1e-6
# Operators of the longest spelling of a function or norm. Without an end, a chain of n operators is
# evaluated n³ times.
_LONGEST = 24
Rule = Callable[[Node, Nodes], Node | None]


def canonical(graph: Graph, nodes: Nodes) -> Graph:
    """The graph with every rule applied wherever it can be."""
    for rules in (RULES, FOLDS):
        made: dict[int, Node] = {}
        for node in graph.nodes():
            found = _with_inputs(node, made, nodes)
            while (better := _first(rules, found, nodes)) is not None:
                found = better
            made[id(node)] = found
        graph = replace(graph, output=made[id(graph.output)])
    return graph


def _first(rules: tuple[Rule, ...], node: Node, nodes: Nodes) -> Node | None:
    return next((found for rule in rules if (found := rule(node, nodes)) is not None), None)


def _with_inputs(node: Node, made: Mapping[int, Node], nodes: Nodes) -> Node:
    """The node with its inputs rewritten."""
    changed: dict[str, Any] = {}
    for name, value in vars(node).items():
        if isinstance(value, Node):
            changed[name] = made[id(value)]
        elif isinstance(value, tuple) and value and isinstance(value[0], Node):
            changed[name] = tuple(made[id(part)] for part in value)
    return nodes(replace(node, **changed)) if changed else node


def function(node: Node, nodes: Nodes) -> Node | None:
    """A chain of elementwise operators on one node that is a known function of it."""
    if not isinstance(node, Pointwise):
        return None
    known = tuple(name for name, one in FUNCTIONS.items() if one.is_recognised)
    for leaf in _leaves(node, (Pointwise,)):
        if node.operands == (leaf,) and node.function in known:
            continue
        within = between(node, leaf)
        kinked = any(isinstance(o, Pointwise) and FUNCTIONS[o.function].has_kink for o in within)
        found = partial(evaluate_from, node, leaf)
        name = probes.nearest_function(found, known, kinked=kinked)
        if name is not None:
            return nodes(Pointwise(node.columns, node.source, name, (leaf,)))
    return None


def norm(node: Node, nodes: Nodes) -> Node | None:
    """A chain of elementwise operators and means that is a norm, without weight and bias."""
    if not isinstance(node, Pointwise):
        return None
    for leaf in _leaves(node, (Pointwise, Mean, Columns, Norm)):
        if leaf.columns != node.columns:
            continue
        within = between(node, leaf)
        groups = {other.group for other in within if isinstance(other, Mean | Norm)}
        if not groups:
            continue
        numbers = {n for o in within if isinstance(o, Pointwise) for n in o.numbers}
        numbers |= {other.eps for other in within if isinstance(other, Norm)}
        # A least root mean square is as good as nothing where float16 does not reach it.
        epsilons = {0.0, *numbers, *(n * n for n in numbers)}
        candidates = {
            (kind, group, eps): partial(
                evaluate_from, Norm(leaf.columns, "", leaf, kind, group, eps), leaf
            )
            for kind in ("rms", "layer")
            for group in groups
            for eps in epsilons
            if 0 <= eps < 1
        }
        found = partial(evaluate_from, node, leaf)
        best = probes.nearest_of_rows(found, candidates, leaf.columns, numbers)
        if best is not None:
            return nodes(Norm(node.columns, node.source, leaf, *best))
    return None


def centred(node: Node, nodes: Nodes) -> Node | None:
    """RMSNorm of x − mean(x) is LayerNorm of x."""
    if not isinstance(node, Norm) or node.kind != "rms":
        return None
    for leaf in _leaves(node.x, (Pointwise, Mean, Columns)):
        if leaf.columns != node.columns:
            continue

        def wanted(x: Tensor, group: int = node.group) -> Tensor:
            groups = x.view(len(x), -1, group)
            return (groups - groups.mean(dim=-1, keepdim=True)).flatten(1)

        found = partial(evaluate_from, node.x, leaf)
        numbers = {n for o in between(node.x, leaf) if isinstance(o, Pointwise) for n in o.numbers}
        if probes.nearest_of_rows(found, {"centred": wanted}, leaf.columns, numbers) is not None:
            return nodes(replace(node, kind="layer", x=leaf))
    return None


def affine_norm(node: Node, nodes: Nodes) -> Node | None:
    """A norm's weight and bias that follow it."""
    if not isinstance(node, ByColumn) or not isinstance(node.x, Norm) or node.x.bias is not None:
        return None
    weight = node.x.weight
    if node.factor is not None:
        weight = node.factor if weight is None else weight * node.factor
    return nodes(replace(node.x, weight=weight, bias=node.offset))


def bias(node: Node, nodes: Nodes) -> Node | None:
    """A vector that is added to a linear layer."""
    if (
        isinstance(node, ByColumn)
        and isinstance(node.x, Linear)
        and node.factor is None
        and node.x.bias is None
    ):
        return nodes(replace(node.x, bias=node.offset))
    return None


def scaled_linear(node: Node, nodes: Nodes) -> Node | None:
    """A linear layer times a number: its weight and bias are."""
    if not isinstance(node, Pointwise) or node.function != "scale":
        return None
    (x,), (factor,) = node.operands, node.numbers
    if not isinstance(x, Linear):
        return None
    weight = replace(x.weight, factor=x.weight.factor * factor)
    vector = None if x.bias is None else x.bias * np.float32(factor)
    return nodes(replace(x, weight=weight, bias=vector))


def attention_scale(node: Node, nodes: Nodes) -> Node | None:
    """Attention whose scale is not 1 / √head_dim: its queries are scaled by the missing factor."""
    if not isinstance(node, Attention):
        return None
    usual = (node.query.columns // node.heads) ** -0.5
    factor = node.scale / usual
    if abs(factor - 1) < _ROUNDED:
        return None
    query = _times(node.query, factor, nodes)
    return nodes(replace(node, query=query, scale=usual))


def _times(node: Node, factor: float, nodes: Nodes) -> Node:
    """The node times a number, put into weights where there are some."""
    number = np.float32(factor)
    if isinstance(node, Rotary):
        return nodes(replace(node, x=_times(node.x, factor, nodes)))
    if isinstance(node, Norm):
        weight = np.ones(node.columns, np.float32) if node.weight is None else node.weight
        bias = None if node.bias is None else node.bias * number
        return nodes(replace(node, weight=weight * number, bias=bias))
    scaled = nodes(Pointwise(node.columns, node.source, "scale", (node,), (factor,)))
    return scaled_linear(scaled, nodes) or scaled


RULES: tuple[Rule, ...] = (function, norm, centred, affine_norm, bias)
"""Recognise functions."""
FOLDS: tuple[Rule, ...] = (scaled_linear, attention_scale)
"""Put numbers into weights, when no function is in the making any more."""


def _leaves(node: Node, kinds: tuple[type[Node], ...]) -> Iterator[Node]:
    """Nodes that all paths to `node` go through, by way of `kinds` alone and of `_LONGEST` nodes at
    the most; the nearest first."""
    leaves = {id(node): node}
    for _ in range(_LONGEST):
        last = max(leaves.values(), key=lambda leaf: leaf.depth)
        weighted = isinstance(last, Norm) and (last.weight is not None or last.bias is not None)
        if not isinstance(last, kinds) or weighted:
            return
        del leaves[id(last)]
        leaves |= {id(other): other for other in last.inputs}
        if len(leaves) == 1:
            yield next(iter(leaves.values()))
