"""Attention's scores while the model is read: never a matrix, only what it is made of.

q · kᵀ begins one; scalars, a soft cap, masks and ALiBi are noted on it; softmax seals it; the
product with v ends it, as one Attention node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memladder.core.case import Workload
from memladder.engine.frontend import views
from memladder.engine.frontend.axes import (
    Axes,
    Axis,
    LayoutError,
    align,
    broadcast_shapes,
    merged,
    regroup,
    same_for_all,
    shape_of,
    token_axes,
)
from memladder.engine.frontend.positions import Bias, read_bias, still_masked
from memladder.engine.frontend.views import Value
from memladder.engine.graph.nodes import Attention, Node

if TYPE_CHECKING:
    from memladder.engine.frontend.convert import Converter


@dataclass(frozen=True, eq=False)
class Scores:
    """query, key: [batch…, tokens, head_dim]. axes: [batch…, query, key] as the model has them."""

    query: Value
    key: Value
    axes: Axes
    scale: float = 1.0
    softcap: float | None = None
    capped: bool = False
    added: bool = False
    biases: tuple[Bias, ...] = ()
    causal: bool = False
    softmaxed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the model."""
        return shape_of(self.axes, self.query.tokens)

    def scaled(self, factor: float) -> Scores:
        """All scores times a number."""
        if self.softmaxed:
            raise LayoutError("probabilities that are multiplied")
        if self.capped and self.softcap is None:
            if factor <= 0:
                raise LayoutError(f"a soft cap of {factor:g}")
            # tanh(s / c) · c: the number is the cap, which has divided before.
            return replace(self, softcap=factor, scale=self.scale * factor)
        if self.capped:
            raise LayoutError("scores that are multiplied after their cap")
        biases = tuple(bias.times(factor) for bias in self.biases)
        return replace(self, scale=self.scale * factor, biases=biases)

    def tanh(self) -> Scores:
        """The inner half of a soft cap. What was added before is capped with the scores: a mask
        would be none any more."""
        if self.capped or self.softmaxed or self.added:
            raise LayoutError("scores of which the hyperbolic tangent is taken")
        return replace(self, capped=True)

    def plus(self, added: np.ndarray) -> Scores:
        """With a constant added that is broadcast against the scores."""
        if self.softmaxed or (self.capped and self.softcap is None):
            raise LayoutError("a constant that is added to probabilities")
        tokens = self.query.tokens
        aligned = align(self.axes, np.asarray(added, np.float32), tokens)
        if not aligned.any():
            return self
        kinds = [f for axis in self.axes for f in axis]
        if tokens.seq_len == 1:
            if not np.isfinite(aligned).all():
                raise LayoutError("whole rows of scores that are masked")
            # One key has all the weight, whatever its score.
            return replace(self, added=True)
        aligned = same_for_all(aligned, [i for i, f in enumerate(kinds) if f == "b"])
        heads = [i for i, f in enumerate(kinds) if isinstance(f, int)]
        order = [i for i, f in enumerate(kinds) if f == "b"]
        order += [*heads, kinds.index("s"), kinds.index("k")]
        sizes = [f for f in kinds if isinstance(f, int)]
        moved = aligned.transpose(order)
        moved = moved.reshape(moved.shape[-len(heads) - 2 :])
        if math.prod(moved.shape[:-2]) > 1:
            moved = np.broadcast_to(moved, (*sizes, *moved.shape[-2:]))
        moved = moved.reshape(-1, *moved.shape[-2:])
        if moved.shape[-1] == 1:
            if not np.isfinite(moved).all():
                raise LayoutError("whole rows of scores that are masked")
            # The same for all of a query's keys: softmax does not see it.
            return replace(self, added=True)
        return replace(self, added=True, biases=(*self.biases, read_bias(moved)))

    def floored(self, number: float) -> Scores:
        """No score below the number, which must be one that masks."""
        biases = tuple(replace(b, floor=max(b.floor, number)) for b in self.biases)
        return replace(self, biases=biases)

    def normalised(self, axis: int) -> Scores:
        """Softmax of each query's keys."""
        keys = ("k",) if self.query.tokens.seq_len > 1 else ()
        last = len(self.axes) - 1
        if axis not in (-1, last) or self.axes[-1] != keys or self.softmaxed:
            raise LayoutError("a softmax over something else than keys")
        return replace(self, softmaxed=True)

    def reshaped(self, shape: tuple[int, ...]) -> Scores:
        """Batch axes regrouped."""
        return replace(self, axes=regroup(self.axes, shape, self.query.tokens))


def begin(query: Value, key: Value) -> Scores:
    """q · kᵀ. query [batch…, tokens, head_dim], key [batch…, tokens, head_dim]."""
    query, key = _by_token(query), _by_token(key)
    if query.shape[-1] != key.shape[-1]:
        raise LayoutError(f"heads of {query.shape[-1]} columns times heads of {key.shape[-1]}")
    batch = broadcast_shapes(query.shape[:-2], key.shape[:-2])
    query, key = _in_batch(query, batch), _in_batch(key, batch)
    if query.axes[:-2] != key.axes[:-2]:
        raise LayoutError("queries and keys of other sequences or heads")
    tokens = query.axes[-2]
    last: Axis = ("k",) if tokens else ()
    return Scores(query, key, (*query.axes[:-2], tokens, last))


def _by_token(value: Value) -> Value:
    """[batch…, tokens, columns]; the columns are one factor, of 1 where there is one only."""
    if len(value.axes) < 2:
        raise LayoutError("a product of two activations that is no attention")
    value = views.with_columns(value.merged(), len(value.axes) - 1)
    if value.axes[-2] != token_axes(value.tokens)[1]:
        raise LayoutError("a product of two activations that is no attention")
    return value


def _in_batch(value: Value, batch: tuple[int, ...]) -> Value:
    return views.expand(value, (*batch, *value.shape[-2:])).merged()


def finish(converter: Converter, scores: Scores, value: Value) -> Value:
    """softmax(scores) · v, v [batch…, tokens, head_dim]."""
    tokens = scores.query.tokens
    value = _by_token(value)
    if not scores.softmaxed or scores.axes[-2] != value.axes[-2]:
        raise LayoutError("a product of two activations that is no attention")
    value = _in_batch(value, broadcast_shapes(scores.shape[:-2], value.shape[:-2]))
    batch = tuple(merged(axis) for axis in scores.axes[:-2])
    if value.axes[:-2] != ((),) * (len(value.axes) - len(scores.axes)) + batch:
        raise LayoutError("values of other sequences or heads than scores")
    query, q_index, q_scale = _by_head(converter, _positioned(scores.query))
    key, k_index, k_scale = _by_head(converter, _positioned(scores.key))
    own, v_index, v_scale = _by_head(converter, value)
    # q · k is the same in any order of a head's columns, if both have it.
    order = np.argsort(q_index[0])
    q_index, k_index = q_index[:, order], k_index[:, order]
    heads = len(q_index)
    k_index, v_index, kv_heads = _grouped(k_index, v_index, heads)
    causal, window, slopes = _bias(scores, tokens, heads)
    if not causal and tokens.seq_len > 1:
        raise LayoutError("attention that is not causal")
    attention = Attention(
        heads * v_index.shape[1],
        converter.source,
        converter.select(query, q_index.reshape(-1)),
        converter.select(key, k_index.reshape(-1)),
        converter.select(own, v_index.reshape(-1)),
        heads,
        kv_heads,
        scores.scale * q_scale * k_scale,
        slopes,
        window,
        scores.softcap,
    )
    size = v_index.shape[1]
    axes = (*value.axes[:-1], (size,) if size > 1 else ())
    found = converter.whole(converter.nodes(attention), axes)
    return views.scaled(found, v_scale)


def _positioned(value: Value) -> Value:
    """Queries or keys; one token alone has all the weight, wherever it is."""
    if value.tokens.seq_len > 1:
        return value
    return replace(value, terms=(views.Term(value.terms[0].index),))


def _by_head(converter: Converter, value: Value) -> tuple[Node, np.ndarray, float]:
    """A node, which of its columns each head has [heads, head_dim], and a number that is left."""
    scale = value.terms[0].scale
    if any(term.scale != scale for term in value.terms) or scale == 0.0:
        scale = 1.0
    settled = converter.settled(_unrepeated(views.scaled(value, 1 / scale)))
    index = settled.terms[0].index
    return settled.node, index.reshape(-1, index.shape[-1]), scale


def _unrepeated(value: Value) -> Value:
    """[heads, tokens, head_dim]: of neighbouring heads that are the same only one is kept."""
    dim = value.columns[-1]
    rows = np.concatenate([term.index.reshape(-1, dim) for term in value.terms], axis=1)
    heads = group = len(rows)
    while group > 1 and (heads % group or (np.repeat(rows[::group], group, axis=0) != rows).any()):
        group -= 1
    tables = [None if term.table is None else _by_group(term, group) for term in value.terms]
    lost = sum(table is None for table in tables) > sum(t.table is None for t in value.terms)
    if group == 1 or lost:
        return value
    terms = tuple(
        replace(
            term,
            index=term.index.reshape(-1, dim)[::group],
            table=table,
        )
        for term, table in zip(value.terms, tables, strict=True)
    )
    axes: Axes = ((heads // group,), *value.axes[-2:-1], (dim,))
    return replace(value, axes=axes, terms=terms)


def _by_group(term: views.Term, group: int) -> np.ndarray | None:
    """The term's table [seq_len, heads / group or 1, head_dim], if it is the same in a group."""
    assert term.table is not None
    table, size = term.table, term.table.shape[-1]
    if math.prod(table.shape[1:-1]) > 1:
        table = np.broadcast_to(table, (len(table), *term.index.shape[:-1], size))
    flat = table.reshape(len(table), -1, size)
    if flat.shape[1] == 1:
        return flat
    kept: np.ndarray = flat[:, ::group]
    return kept if (np.repeat(kept, group, axis=1) == flat).all() else None


def _grouped(
    k_index: np.ndarray, v_index: np.ndarray, heads: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys and values without those that several query heads share; how many are left."""
    if heads % len(k_index) or heads % len(v_index):
        raise LayoutError(f"{heads} heads of queries, {len(k_index)} of keys, {len(v_index)}")
    k_index = np.repeat(k_index, heads // len(k_index), axis=0)
    v_index = np.repeat(v_index, heads // len(v_index), axis=0)
    both = np.concatenate((k_index, v_index), axis=1)
    group = 1
    while group < heads and (both[group] == both[0]).all():
        group += 1
    if heads % group or (np.repeat(both[::group], group, axis=0) != both).any():
        raise LayoutError("heads of queries that share keys and values in no groups")
    return k_index[::group], v_index[::group], heads // group


def _bias(
    scores: Scores, tokens: Workload, heads: int
) -> tuple[bool, int | None, np.ndarray | None]:
    if not still_masked(scores.biases):
        raise LayoutError("numbers added to attention's scores that undo a mask")
    causal = scores.causal or any(b.causal for b in scores.biases)
    windows = [b.window for b in scores.biases if b.window is not None]
    slopes = [b.slopes for b in scores.biases if b.slopes is not None]
    total = np.broadcast_to(sum(slopes), (heads,)).astype(np.float32) if slopes else None
    window = min(windows, default=None)
    return causal, None if window is None or window >= tokens.seq_len else window, total
