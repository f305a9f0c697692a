"""Steps for some tokens: each node is a kernel, whose value lives as long as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from memladder.core.errors import GraphError
from memladder.engine.graph.fused import Fused, Glu, NamedNorm, Product
from memladder.engine.graph.nodes import Attention, Input, Node, Pointwise, Rotary
from memladder.engine.program.builder import Builder
from memladder.engine.program.steps import Rows, Value


class OverlapError(Exception):
    """A kernel would write over what it reads."""


@dataclass
class Chunk:
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
        # A graph may be deeper than Python's stack.
        waiting = [node]
        while waiting:
            first = waiting[-1]
            missing = [x for x in first.inputs if id(x) not in self.places]
            if id(first) in self.places:
                waiting.pop()
            elif isinstance(first, Input):
                raise OverlapError
            elif missing:
                waiting.extend(reversed(missing))
            else:
                found = [self.places[id(x)] for x in first.inputs]
                place = out if out is not None and first is node else self._new(first)
                self._step(first, found, place)
                # What lay there is gone.
                self.places = {key: x for key, x in self.places.items() if not x.overlaps(place)}
                self.places[id(first)] = place
        return self.places[id(node)]

    def _new(self, node: Node) -> Rows:
        return self.builder.new(_stem(node), self.size, node.columns)

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
            self._rotary(node, reads[0], out)
        elif isinstance(node, Pointwise):
            self._pointwise(node, reads, out)
        else:
            raise GraphError(f"no kernel for {type(node).__name__.lower()} {node.source!r}")

    def _rotary(self, node: Rotary, x: Rows, out: Rows) -> None:
        values: dict[str, Value] = {
            "head_dim": node.head_dim,
            "start": self.position,
            "seq_len": self.builder.shape.seq_len,
        }
        weights = {"frequencies": "rotary.frequencies"}
        self.builder.step("rotary", {"x": x}, {"out": out}, weights, values, (("x", "out"),))

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
        raise OverlapError


def _stem(node: Node) -> str:
    """A buffer's name."""
    if isinstance(node, NamedNorm):
        return "normed"
    if isinstance(node, Glu) or (isinstance(node, Product) and node.weight.startswith("up")):
        return "inner"
    return "sum" if isinstance(node, Product) and node.residual is not None else "value"
