"""Steps for some tokens of sequences that have a key-value cache.

Keys and values go into the cache first, then queries attend to all that it holds. Positions are
read where the steps run.
"""

from __future__ import annotations

from dataclasses import dataclass

from memladder.core.errors import GraphError
from memladder.engine.graph.fused import Fused
from memladder.engine.graph.nodes import Attention, Node, Rotary
from memladder.engine.program.builder import Builder
from memladder.engine.program.cache import POSITIONS, CacheShape
from memladder.engine.program.chunk import Chunk
from memladder.engine.program.steps import Buffer, Rows, Value


def begin(builder: Builder, attention: Attention, cache: CacheShape) -> None:
    """The cache's buffers, and the positions of all sequences."""
    builder.state = cache.state(attention.kv_heads, _head_dim(attention), window(attention, cache))
    builder.scalars = (Buffer(POSITIONS, builder.shape.batch_size, 3, "int32"),)


def attention_part(
    builder: Builder, fused: Fused, attention: Attention, end: Node, cache: CacheShape
) -> None:
    """All tokens up to `end`, which is written into the output, chunk by chunk: none of them sees a
    later one."""
    seq_len = builder.shape.seq_len
    for first, count in builder.sequences():
        start, rows = first * seq_len, count * seq_len
        positions = Rows(POSITIONS, first, count)
        for at, size in builder.chunks(start, rows):
            places = {id(fused.input): Rows(builder.input, at, size)}
            part = CachedChunk(
                builder, fused, at, places, at - start, cache=cache, positions=positions
            )
            part.append(attention)
            part.attend_to_all(attention)
            part.emit(end, Rows(builder.output, at, size))


def window(attention: Attention, cache: CacheShape) -> int | None:
    """How many tokens one sees, as the graph or the configuration says; None for all there can be.

    Raises GraphError where both say it and differ.
    """
    known = {size for size in (attention.window, cache.window) if size is not None}
    if len(known) > 1:
        raise GraphError(
            f"the layer's window is {attention.window} tokens, the configuration's {cache.window}"
        )
    found = min(known, default=None)
    return None if found is None or found >= cache.context else found


def _head_dim(attention: Attention) -> int:
    return attention.query.columns // attention.heads


@dataclass(kw_only=True)
class CachedChunk(Chunk):
    """`position` is that of the first token among its sequence's new ones."""

    cache: CacheShape
    positions: Rows

    def append(self, attention: Attention) -> None:
        """Keys and values into the cache; and the queries, rotated as the keys are."""
        query, key = attention.query, attention.key
        rotated = self.fused.rotated
        if self.fused.projected:
            self._project()
        if not rotated and isinstance(query, Rotary) and isinstance(key, Rotary):
            # The kernel that appends rotates both.
            rotated, query, key = True, query.x, key.x
        reads = {"key": self.emit(key), "value": self.emit(attention.value)}
        self.places[id(attention.query)] = self.emit(query)
        writes = self._state()
        weights = {}
        if rotated:
            weights = {"frequencies": "rotary.frequencies"}
            reads["query"] = self.places[id(attention.query)]
            writes["turned"] = self.builder.new("query", self.size, query.columns)
            self.places[id(attention.query)] = writes["turned"]
        places = (("query", "turned"),) if rotated else ()
        reads["positions"] = self.positions
        self.builder.step("cache_append", reads, writes, weights, self._values(attention), places)

    def _project(self) -> None:
        x = self.emit(self.fused.projected[0].x)
        made = {}
        for name, product in zip(("query", "key", "value"), self.fused.projected, strict=True):
            made[name] = self.builder.new(name, self.size, product.columns)
            self.places[id(product)] = made[name]
        self.builder.qkv(x, None, 0, **made)

    def attend_to_all(self, attention: Attention) -> None:
        """Attention of the chunk's queries over all that its sequences' slots hold."""
        cache, sequences = self.cache, self.positions.count
        seen = window(attention, cache)
        values = self._values(attention) | {
            "heads": attention.heads,
            "window": seen or 0,
            "softcap": attention.softcap or 0.0,
            # Rounding to 8 bits is a step function: it would make much of a small difference.
            "exact": self.builder.activation is not None,
        }
        weights = {} if attention.slopes is None else {"slopes": "alibi.slopes"}
        reads = {"query": self.places[id(attention.query)], "positions": self.positions}
        writes = {"out": self.builder.new("attended", self.size, attention.columns)}
        rows, heads = self.size // sequences, attention.heads
        parts = cache.parts(sequences, rows, heads, attention.kv_heads, seen)
        if parts > 1:
            sizes = (self.size * heads * parts, _head_dim(attention) + 2)
            writes["partial"] = self.builder.new("partial", *sizes, "float32")
        places = (("query", "out"),)
        self.builder.step(
            "cached_attention", reads | self._state(), writes, weights, values, places
        )
        self.places[id(attention)] = writes["out"]

    def _state(self) -> dict[str, Rows]:
        return {buffer.name: Rows(buffer.name, 0, buffer.rows) for buffer in self.builder.state}

    def _values(self, attention: Attention) -> dict[str, Value]:
        return {
            "kv_heads": attention.kv_heads,
            "capacity": self.cache.capacity(window(attention, self.cache)),
            "start": self.position,
            "format": self.cache.format,
        }

    def _rotary(self, node: Rotary, x: Rows, out: Rows) -> None:
        values: dict[str, Value] = {"head_dim": node.head_dim, "start": self.position}
        reads = {"x": x, "positions": self.positions}
        weights = {"frequencies": "rotary.frequencies"}
        self.builder.step("rotary_at", reads, {"out": out}, weights, values, (("x", "out"),))
