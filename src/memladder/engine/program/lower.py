"""Kernels over chunks of tokens: the program of a fused layer with the least activations.

All but attention works token by token. So: keys and values of a sequence (of as many short ones as
fill a chunk), then chunk by chunk queries, attention and all that follows, up to the node on which
alone the rest depends: it lies where the hidden states were. Then the rest. Before attention and
after it as many tokens at a time as attention's memory holds: weights are read less often. Within a
chunk a value lives only as long as it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from memladder.core.case import Workload
from memladder.core.errors import GraphError
from memladder.engine.graph.fused import Fused, Glu, NamedNorm, Product
from memladder.engine.graph.nodes import Attention, Node, Pointwise, Rotary, ordered
from memladder.engine.program.builder import CHUNK, Builder, ahead_chunk, free_chunk, in_chunks
from memladder.engine.program.steps import Program, Rows, Value
from memladder.formats.base import Format


class _OverlapError(Exception):
    """A kernel would write over what it reads."""


def lower(
    fused: Fused,
    shape: Workload,
    activation: Format | None = None,
    *,
    plain: Iterable[str] = (),
    chunk: int = CHUNK,
    budget: int = 0,
    in_place: bool = True,
) -> Program:
    """The layer's program at a shape; `activation` is None for fp16. `plain`: matrices that stay in
    fp16 where others do not. `chunk`: tokens at a time; keys and values, and what follows
    attention, take as many as need no more memory than attention, or than `budget` in bytes.

    The output overwrites the input with `in_place`, unless a kernel would then write over what it
    reads.
    """
    try:
        return _program(fused, shape, activation, frozenset(plain), chunk, budget, in_place)
    except _OverlapError:
        return _program(fused, shape, activation, frozenset(plain), chunk, budget, in_place=False)


def _program(
    fused: Fused,
    shape: Workload,
    activation: Format | None,
    plain: frozenset[str],
    chunk: int,
    budget: int,
    in_place: bool,
) -> Program:
    biases = frozenset(name for name in fused.matrices if f"{name}.bias" in fused.vectors)
    width = fused.hidden_size
    builder = Builder(shape, width, fused.matrices, biases, activation, plain, chunk, in_place)
    start = fused.input
    if fused.attention is not None:
        attention, start = fused.attention, _cut(fused, fused.attention)

        def attend(builder: Builder, ahead: int) -> None:
            _attention_part(builder, fused, attention, start, ahead)

        attend(builder, ahead_chunk(builder, attend, budget))
    if start is not fused.output:

        def write(builder: Builder, at: int, size: int) -> None:
            source = builder.input if start is fused.input else builder.output
            chunk = _Chunk(builder, fused, at, {id(start): Rows(source, at, size)})
            chunk.emit(fused.output, Rows(builder.output, at, size))

        if fused.attention is not None:
            builder.chunk = free_chunk(builder, write, budget)
        in_chunks(builder, write)
    return builder.program()


def _cut(fused: Fused, attention: Attention) -> Node:
    """The first node after attention on which alone all later ones depend."""
    nodes = ordered(fused.output)
    for node in nodes:
        before = {id(other) for other in ordered(node)}
        later = [other for other in nodes if id(other) not in before]
        reads = {id(x) for other in later for x in other.inputs} & before
        if (
            id(attention) in before
            and node.columns == fused.input.columns
            and reads <= {id(node)}
            and not isinstance(node, Attention)
        ):
            return node
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


def _part(builder: Builder, fused: Fused, at: int, size: int, position: int) -> _Chunk:
    return _Chunk(builder, fused, at, {id(fused.input): Rows(builder.input, at, size)}, position)


@dataclass
class _Chunk:
    """Some tokens from `at` on, the first at `position` of its sequence; where values are."""

    builder: Builder
    fused: Fused
    at: int
    places: dict[int, Rows]
    position: int = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = next(iter(self.places.values())).count

    def project(self, attention: Attention, targets: Mapping[str, Rows], *, query: bool) -> None:
        """Keys and values into their places, if they are given, and the chunk's queries."""
        if self.fused.projected:
            self._products(attention, targets, query=query)
        for name, target in targets.items():
            if self.emit(getattr(attention, name), target) != target:
                raise GraphError(f"no kernel for {name} of attention {attention.source!r}")
        if query:
            self.emit(attention.query)

    def _products(self, attention: Attention, targets: Mapping[str, Rows], *, query: bool) -> None:
        """What one kernel projects: to its place, or to where norms and rotations read it."""
        x = self.emit(self.fused.projected[0].x)
        named = {}
        for name, product in zip(("query", "key", "value"), self.fused.projected, strict=True):
            if name in targets and getattr(attention, name) is product:
                named[name] = targets[name]
            elif name in targets or (query and name == "query"):
                named[name] = self.builder.new(name, self.size, product.columns)
            if name in named:
                self.places[id(product)] = named[name]
        # Keys and values first: a program's buffers are in the order in which they are written.
        order = sorted(named, key=lambda name: name == "query")
        self._qkv(x, attention, {name: named[name] for name in order})

    def _qkv(self, x: Rows, attention: Attention, targets: Mapping[str, Rows]) -> None:
        head_dim = None
        if self.fused.rotated:
            head_dim = attention.query.columns // attention.heads
        self.builder.qkv(x, head_dim, self.position, **targets)

    def attend(self, attention: Attention, key: Rows, value: Rows) -> None:
        """Attention of the chunk's queries over the keys before them."""
        seq_len = self.builder.shape.seq_len
        several = key.count > seq_len
        # One sequence's chunk sees the keys up to its own last row; of several, each is whole.
        seen = key.count if several else self.position + self.size
        weights = {} if attention.slopes is None else {"slopes": "alibi.slopes"}
        values: dict[str, Value] = {
            "sequences": key.count // seq_len if several else 1,
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            # Rounding to 8 bits is a step function: it would make much of a small difference.
            "exact": self.builder.activation is not None,
        }
        kernel = "attention"
        if attention.window is not None or attention.softcap is not None:
            kernel = "windowed_attention"
            values |= {"window": attention.window or 0, "softcap": attention.softcap or 0.0}
        out = self.builder.new("attended", self.size, attention.columns)
        self.builder.step(
            kernel,
            {
                "query": self.places[id(attention.query)],
                "key": Rows(key.buffer, 0, seen),
                "value": Rows(value.buffer, 0, seen),
            },
            {"out": out},
            weights,
            values,
            (("query", "out"),),
        )
        self.places[id(attention)] = out

    def emit(self, node: Node, out: Rows | None = None) -> Rows:
        """Steps that compute the node, into `out` if that is given; where it is then."""
        if id(node) not in self.places:
            found = [self.emit(x) for x in node.inputs]
            place = out or self.builder.new(_stem(node), self.size, node.columns)
            self._step(node, found, place)
            self.places[id(node)] = place
        return self.places[id(node)]

    def _step(self, node: Node, reads: list[Rows], out: Rows) -> None:
        builder = self.builder
        if isinstance(node, Product):
            *residual, x = reads
            _apart([x], out)
            builder.linear(node.weight, x, out, node.activation, *residual)
        elif isinstance(node, Glu):
            _apart(reads, out)
            builder.glu(reads[0], out, node.activation, node.gate, node.up)
        elif isinstance(node, NamedNorm):
            self._norm(node, reads[0], out)
        elif isinstance(node, Rotary):
            values: dict[str, Value] = {
                "head_dim": node.head_dim,
                "start": self.position,
                "seq_len": builder.shape.seq_len,
            }
            weights = {"frequencies": "rotary.frequencies"}
            builder.step("rotary", {"x": reads[0]}, {"out": out}, weights, values, (("x", "out"),))
        elif isinstance(node, Pointwise):
            self._pointwise(node, reads, out)
        else:
            raise GraphError(f"no kernel for {type(node).__name__.lower()} {node.source!r}")

    def _norm(self, node: NamedNorm, x: Rows, out: Rows) -> None:
        weights = {"weight": f"{node.name}.weight"}
        if node.kind == "layer":
            weights["bias"] = f"{node.name}.bias"
        values: dict[str, Value] = {"eps": node.eps}
        kernel = f"{node.kind}_norm"
        if node.group < node.columns:
            places = (("x", "out"),)
            self.builder.step(f"{kernel}_heads", {"x": x}, {"out": out}, weights, values, places)
        else:
            self.builder.step(kernel, {"x": x}, {"out": out}, weights, values)

    def _pointwise(self, node: Pointwise, reads: list[Rows], out: Rows) -> None:
        values: dict[str, Value] = {"function": node.function}
        values |= dict(zip(("number", "most"), node.numbers, strict=False))
        named = dict(zip(("x", "other"), reads, strict=False))
        places = tuple((name, "out") for name in named)
        self.builder.step("pointwise", named, {"out": out}, {}, values, places)


def _apart(reads: list[Rows], out: Rows) -> None:
    """A product reads whole rows for each of its columns: it can't write over them."""
    if any(x.buffer == out.buffer for x in reads):
        raise _OverlapError


def _stem(node: Node) -> str:
    """A buffer's name."""
    if isinstance(node, NamedNorm):
        return "normed"
    if isinstance(node, Glu) or (isinstance(node, Product) and node.weight.startswith("up")):
        return "inner"
    return "sum" if isinstance(node, Product) and node.residual is not None else "value"
