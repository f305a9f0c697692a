"""Writing a layer's program, step by step; how its tokens are divided into chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

from memladder.core.case import Workload
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import CHUNK, ITEM_BYTES, Buffer, Program, Rows, Step, Value
from memladder.formats._shared.base import Format

TILE = 128
"""Rows of a product's tile: chunks are multiples of it."""

STATES = "hidden_states"


@dataclass
class Builder:
    """A program in the making. `matrices` are the layer's, [rows, columns]; `activation` is None
    for fp16. Those that are `plain` stay in fp16 where others do not, and so do their activations:
    no kernel has both."""

    shape: Workload
    hidden_size: int
    matrices: Mapping[str, tuple[int, int]]
    biases: frozenset[str]
    activation: Format | None
    plain: frozenset[str] = frozenset()
    chunk: int = CHUNK
    in_place: bool = True
    buffers: dict[str, Buffer] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    quantised: dict[Rows, tuple[Rows, Rows]] = field(default_factory=dict)
    state: tuple[Buffer, ...] = ()
    scalars: tuple[Buffer, ...] = ()

    def __post_init__(self) -> None:
        self.input = self.new(STATES, self.shape.tokens, self.hidden_size).buffer
        # Without leave to overwrite the input, the attention's residual goes to the output.
        self.output = (
            self.input
            if self.in_place
            else self.new("output", self.shape.tokens, self.hidden_size).buffer
        )

    def program(self) -> Program:
        """What was written so far."""
        buffers, steps = tuple(self.buffers.values()), tuple(self.steps)
        return Program(buffers, steps, self.input, self.output, self.state, self.scalars)

    def new(self, stem: str, rows: int, columns: int, dtype: str = "float16") -> Rows:
        """A buffer of its own, all of its rows."""
        name = stem if stem not in self.buffers else f"{stem}.{len(self.buffers)}"
        self.buffers[name] = Buffer(name, rows, columns, dtype)
        return Rows(name, 0, rows)

    def step(
        self,
        kernel: str,
        reads: Mapping[str, Rows],
        writes: Mapping[str, Rows],
        weights: Mapping[str, str] | None = None,
        values: Mapping[str, Value] | None = None,
        in_place: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """One step more. What was made of rows that it overwrites is of no use any more."""
        self.steps.append(Step(kernel, reads, writes, weights or {}, values or {}, in_place))
        for x in [x for x in self.quantised if any(map(x.overlaps, writes.values()))]:
            del self.quantised[x]

    def linear(
        self, name: str, x: Rows, out: Rows, activation: str = "", residual: Rows | None = None
    ) -> Rows:
        """out = activation(x · Wᵀ + bias) + residual, which may be overwritten."""
        reads, weights, values = self._operands(x, {"weight": name})
        if activation:
            values["activation"] = activation
        if residual is None:
            self.step("matmul", reads, {"out": out}, weights, values)
        else:
            reads["residual"] = residual
            self.step("matmul", reads, {"out": out}, weights, values, (("residual", "out"),))
        return out

    def glu(self, x: Rows, out: Rows, activation: str, gate: str = "gate", up: str = "up") -> Rows:
        """out = activation(gate) · up."""
        if (gate in self.plain) != (up in self.plain):
            gated = self.linear(
                gate, x, self.new("gate", x.count, self.matrices[gate][0]), activation
            )
            both = {"x": gated, "other": self.linear(up, x, out)}
            places = (("x", "out"), ("other", "out"))
            self.step("pointwise", both, {"out": out}, {}, {"function": "mul"}, places)
            return out
        reads, weights, values = self._operands(x, {"gate": gate, "up": up})
        self.step("glu", reads, {"out": out}, weights, values | {"activation": activation})
        return out

    def qkv(self, x: Rows, head_dim: int | None, start: int, **targets: Rows) -> None:
        """`query`, `key`, `value`, or some of them; row 0 of x is at position `start`.

        With `head_dim` queries and keys are rotated.
        """
        for plain in (False, True):
            own = {name: rows for name, rows in targets.items() if (name in self.plain) == plain}
            if own:
                self._qkv(x, head_dim, start, own)

    def _qkv(self, x: Rows, head_dim: int | None, start: int, targets: dict[str, Rows]) -> None:
        # What attention gives is rounded to 8 bits, a step function: it would make much of the bits
        # that tensor cores leave away where they add up fp8 products.
        wide = self.activation is not None and self.activation.has_fp8_products
        matrices = {f"{name}_weight": name for name in targets}
        reads, weights, values = self._operands(x, matrices, wide)
        if head_dim is not None:
            weights["frequencies"] = "rotary.frequencies"
            values |= {"head_dim": head_dim, "start": start, "seq_len": self.shape.seq_len}
        self.step("qkv", reads, targets, weights, values)

    def _operands(
        self, x: Rows, matrices: dict[str, str], wide: bool = False
    ) -> tuple[dict[str, Rows], dict[str, str], dict[str, Value]]:
        """What every product has: its reads, weights with their biases, and values.

        `matrices` are their names by the kernel's arguments; `<argument>_bias` is its bias. A
        quantised operand is kept as float16 where `wide`.
        """
        weights = dict(matrices)
        for argument, name in matrices.items():
            if name in self.biases:
                stem = argument.removesuffix("weight").removesuffix("_")
                weights[f"{stem}_bias" if stem else "bias"] = f"{name}.bias"
        reads = {"x": x}
        values: dict[str, Value] = {}
        if self.activation is not None and not self.plain.issuperset(matrices.values()):
            _, columns = self.matrices[next(iter(matrices.values()))]
            reads["x"], reads["scales"] = self._quantise(x, columns, wide)
            values["format"] = str(self.activation)
        return reads, weights, values

    def _quantise(self, x: Rows, columns: int, wide: bool) -> tuple[Rows, Rows]:
        """The operand of a product in the activation's format, once for all who read it."""
        assert self.activation is not None
        if x not in self.quantised:
            scale = self.activation.scale_dtype
            assert scale is not None
            dtype = str(scale).removeprefix("torch.")
            assert dtype in ITEM_BYTES
            self.quantised[x] = (
                self.new(f"{x.buffer}.codes", x.count, columns, "float16" if wide else "uint8"),
                self.new(f"{x.buffer}.scales", x.count, self.activation.groups(columns), dtype),
            )
            codes, scales = self.quantised[x]
            values: dict[str, Value] = {"format": str(self.activation)}
            self.step("quantise", {"x": x}, {"codes": codes, "scales": scales}, values=values)
        return self.quantised[x]

    def sequences(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole sequences: as many as fill a chunk, one at least."""
        step = max(1, self.chunk // self.shape.seq_len)
        for start in range(0, self.shape.batch_size, step):
            yield start, min(step, self.shape.batch_size - start)

    def chunks(self, start: int, count: int, size: int = 0) -> Iterator[tuple[int, int]]:
        """Rows start … start + count − 1, a chunk at a time, or `size`."""
        size = size or self.chunk
        for first in range(start, start + count, size):
            yield first, min(size, start + count - first)


Write = Callable[[Builder, int, int], None]


def in_chunks(builder: Builder, write: Write) -> None:
    for at, size in builder.chunks(0, builder.shape.tokens):
        write(builder, at, size)


def ahead_chunk(builder: Builder, attend: Callable[[Builder, int], None], budget: int = 0) -> int:
    """How many tokens' keys and values at a time take no more memory than attention does, or than
    the budget in bytes, if that is more: a chunk, or twice as many, or four times …

    Queries and what attention gives are not there yet; an output of its own is not either, but its
    place is left alone, as the planner would have to leave gaps. `attend` writes all sequences up
    to and with attention, given that number.
    """
    shape, size = builder.shape, builder.chunk
    seq_len = shape.seq_len
    one = replace(
        builder, shape=Workload(1, seq_len), in_place=True, buffers={}, steps=[], quantised={}
    )

    def nbytes(ahead: int) -> int:
        trial = deepcopy(one)
        attend(trial, ahead)
        return plan(trial.program()).nbytes

    if seq_len <= size or size % TILE:
        return size
    others = shape.tokens * _kept(builder) - seq_len * _kept(one)
    most = max(nbytes(size), budget - others)
    while size < seq_len and nbytes(2 * size) <= most:
        size *= 2
    return size


def free_chunk(builder: Builder, write: Write, budget: int = 0) -> int:
    """How many tokens at a time take no more memory than what was written so far does, or than the
    budget in bytes, if that is more.

    Attention holds all keys and values, which MLP has no need of: weights are read less often.
    Chunks are about equally long, and multiples of `TILE`.
    """
    tokens, chunk = builder.shape.tokens, builder.chunk
    if tokens <= chunk or chunk % TILE:
        return chunk
    one = replace(
        builder, shape=Workload(1, chunk), in_place=True, buffers={}, steps=[], quantised={}
    )
    write(one, 0, chunk)
    # The states' own rows are there in any case.
    row_bytes = plan(one.program()).lower_bound / chunk - _row_bytes(one, one.input)
    before = plan(builder.program())
    most = (max(before.lower_bound, budget) - tokens * _kept(builder)) / row_bytes
    least = max(1, math.ceil(tokens / max(most, chunk)))
    for count in range(least, least + 3):
        size = math.ceil(tokens / count / TILE) * TILE
        trial = deepcopy(builder)
        trial.chunk = size
        in_chunks(trial, write)
        # The planner may have to leave gaps.
        if size > chunk and plan(trial.program()).nbytes <= max(before.nbytes, budget):
            return size
    return chunk


def _kept(builder: Builder) -> int:
    """A token's bytes that stay from the first step to the last."""
    return sum(_row_bytes(builder, name) for name in {builder.input, builder.output})


def _row_bytes(builder: Builder, name: str) -> int:
    buffer = builder.buffers[name]
    return buffer.nbytes // buffer.rows
