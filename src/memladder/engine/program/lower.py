"""Kernels over chunks of tokens: the program of a fused layer with the least activations.

All but attention works token by token. So: keys and values of a sequence (of as many short ones as
fill a chunk), then chunk by chunk queries and attention, up to the first node that carries
everything later: it lies where the hidden states were. Then the remainder. Before and after
attention a step takes as many tokens as attention's memory holds: weights are read less often.
Within a chunk a value lives only as long as it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from memladder.core.case import Workload
from memladder.core.errors import GraphError
from memladder.engine.graph.fused import Fused
from memladder.engine.graph.nodes import Attention, Node, ordered
from memladder.engine.program import cached
from memladder.engine.program.builder import Builder, ahead_chunk, free_chunk, in_chunks
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.chunk import Chunk, OverlapError
from memladder.engine.program.steps import CHUNK, Program, Rows
from memladder.formats._shared.base import Format


def lower(
    fused: Fused,
    shape: Workload,
    activation: Format | None = None,
    *,
    plain: Iterable[str] = (),
    chunk: int = CHUNK,
    budget: int = 0,
    in_place: bool = True,
    cache: CacheShape | None = None,
) -> Program:
    """The layer's program at a shape; `activation` is None for fp16. `plain`: matrices that stay in
    fp16 where others do not. `chunk`: tokens at a time; keys and values, and what follows
    attention, take as many as need no more memory than attention, or than `budget` in bytes.

    The output overwrites the input with `in_place`, unless a kernel would then write over what it
    reads.

    With a `cache` the layer's sequences have a past: the program's state is the cache, its scalar
    the positions, and `shape` says how many sequences bring how many rows, some of which may be
    padding. Without one sequences begin at position 0, and nothing is kept. Raises UsageError for
    more rows or sequences than the cache is for.
    """
    if cache is not None:
        cache.require(shape)
    plain = frozenset(plain)
    try:
        return _program(fused, shape, activation, plain, chunk, budget, in_place, cache)
    except OverlapError:
        return _program(fused, shape, activation, plain, chunk, budget, False, cache)


def _program(
    fused: Fused,
    shape: Workload,
    activation: Format | None,
    plain: frozenset[str],
    chunk: int,
    budget: int,
    in_place: bool,
    cache: CacheShape | None,
) -> Program:
    biases = frozenset(name for name in fused.matrices if f"{name}.bias" in fused.vectors)
    width = fused.hidden_size
    builder = Builder(shape, width, fused.matrices, biases, activation, plain, chunk, in_place)
    start = fused.input
    if fused.attention is not None:
        attention, start = fused.attention, _cut(fused, fused.attention)

        def attend(builder: Builder, ahead: int) -> None:
            _attention_part(builder, fused, attention, start, ahead)

        if cache is not None:
            cached.begin(builder, attention, cache)
            cached.attention_part(builder, fused, attention, start, cache)
        else:
            attend(builder, ahead_chunk(builder, attend, budget))
    if start is not fused.output:

        def write(builder: Builder, at: int, size: int) -> None:
            source = builder.input if start is fused.input else builder.output
            chunk = Chunk(builder, fused, at, {id(start): Rows(source, at, size)})
            chunk.emit(fused.output, Rows(builder.output, at, size))

        if fused.attention is not None:
            builder.chunk = free_chunk(builder, write, budget)
        in_chunks(builder, write)
    return builder.program()


def _cut(fused: Fused, attention: Attention) -> Node:
    """The first node after attention on which alone all later ones depend."""
    nodes = ordered(fused.output)
    place = {id(node): number for number, node in enumerate(nodes)}
    readers = [0] * len(nodes)
    for number, node in enumerate(nodes):
        for x in node.inputs:
            readers[place[id(x)]] = number
    # The last reader of all that comes before a node: beyond the node, it reads past it.
    latest = 0
    for number, node in enumerate(nodes):
        if (
            number > place[id(attention)]
            and node.columns == fused.input.columns
            and latest <= number
        ):
            return node
        latest = max(latest, readers[number])
    raise GraphError(f"a layer that ends with attention {attention.source!r}")


def _attention_part(
    builder: Builder, fused: Fused, attention: Attention, end: Node, ahead: int
) -> None:
    """All tokens up to `end`, which is written into the output; keys and values of `ahead` tokens
    at a time."""
    seq_len = builder.shape.seq_len
    for first, count in builder.sequences():
        start, rows = first * seq_len, count * seq_len
        held = {
            id(attention.key): builder.new("key", rows, attention.key.columns),
            id(attention.value): builder.new("value", rows, attention.value.columns),
        }
        chunks = list(builder.chunks(start, rows))
        for at, size in builder.chunks(start, rows, ahead if len(chunks) > 1 else rows):
            targets = {
                name: Rows(held[id(node)].buffer, at - start, size)
                for name, node in (("key", attention.key), ("value", attention.value))
            }
            part = _part(builder, fused, at, size, at - start)
            part.project(attention, targets, query=len(chunks) == 1)
        for at, size in chunks:
            if len(chunks) > 1:
                # All keys and values had to be there first; of the rest none was kept.
                part = _part(builder, fused, at, size, at - start)
                part.project(attention, {}, query=True)
            part.attend(attention, held[id(attention.key)], held[id(attention.value)])
            part.emit(end, Rows(builder.output, at, size))


def _part(builder: Builder, fused: Fused, at: int, size: int, position: int) -> Chunk:
    return Chunk(builder, fused, at, {id(fused.input): Rows(builder.input, at, size)}, position)
