"""Writing a decoder layer's program with the least activations.

The hidden states are one buffer, which the layer's output overwrites. Sequence by sequence (as
many short ones at once as fill a chunk): keys and values of all its tokens, then chunk by chunk
norm → query → attention → output projection → residual. Then for all tokens, chunk by chunk,
norm → MLP → residual. Within a chunk each intermediate lives only as long as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from memladder.case import Shape
from memladder.engine.program import ITEM_BYTES, Buffer, Program, Rows, Step, Value
from memladder.engine.sources import Matrix
from memladder.formats.base import Format

CHUNK = 512
"""Tokens at a time: beyond a few hundred, weights are reused enough for the arithmetic to count."""

STATES = "hidden_states"


@dataclass(frozen=True)
class Attention:
    """Heads, and how positions enter: `rotary` or `alibi`."""

    heads: int
    kv_heads: int
    head_dim: int
    positions: str


@dataclass
class Builder:
    """A program in the making. `matrices` are the layer's; `activation` is None for fp16."""

    shape: Shape
    hidden_size: int
    matrices: Mapping[str, Matrix]
    biases: frozenset[str]
    activation: Format | None
    chunk: int = CHUNK
    in_place: bool = True
    buffers: dict[str, Buffer] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    quantised: dict[Rows, tuple[Rows, Rows]] = field(default_factory=dict)

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
        return Program(tuple(self.buffers.values()), tuple(self.steps), self.input, self.output)

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
        """One step more."""
        self.steps.append(Step(kernel, reads, writes, weights or {}, values or {}, in_place))

    def linear(self, name: str, x: Rows, out: Rows, activation: str = "", **operands: Rows) -> Rows:
        """out = epilogue(x · Wᵀ + bias): `activation`, then times `factor`, then plus `residual`.

        An epilogue's operand is read where the result is written, so that it may be overwritten.
        """
        weights = {"weight": name}
        if name in self.biases:
            weights["bias"] = f"{name}.bias"
        codes, scales = self._quantise(x, self.matrices[name].columns)
        reads = {"x": codes, **({"scales": scales} if scales else {}), **operands}
        values: dict[str, Value] = {"activation": activation} if activation else {}
        if scales is not None:
            values["format"] = str(self.activation)
        in_place = tuple((operand, "out") for operand in operands)
        self.step("matmul", reads, {"out": out}, weights, values, in_place)
        return out

    def _quantise(self, x: Rows, columns: int) -> tuple[Rows, Rows | None]:
        """The operand of a product in the activation's format, once for all who read it."""
        if self.activation is None:
            return x, None
        if x not in self.quantised:
            scale = self.activation.scale_dtype
            assert scale is not None
            dtype = str(scale).removeprefix("torch.")
            assert dtype in ITEM_BYTES
            self.quantised[x] = (
                self.new(f"{x.buffer}.codes", x.count, columns, "uint8"),
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

    def chunks(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Rows start … start + count − 1, a chunk at a time."""
        for first in range(start, start + count, self.chunk):
            yield first, min(self.chunk, start + count - first)


def attention_block(
    builder: Builder, norm: Mapping[str, Value], attention: Attention, residual_is_norm: bool
) -> None:
    """norm → query, key, value → attention → output projection → residual, for all tokens."""
    seq_len = builder.shape.seq_len
    width = attention.kv_heads * attention.head_dim
    for first, count in builder.sequences():
        start, rows = first * seq_len, count * seq_len
        key, value = builder.new("key", rows, width), builder.new("value", rows, width)
        chunks = list(builder.chunks(start, rows))
        for at, size in chunks:
            normed = _norm(builder, "attention_norm", norm, Rows(builder.input, at, size))
            for target in (key, value):
                part = Rows(target.buffer, at - start, size)
                builder.linear("key" if target is key else "value", normed, part)
                if target is key and attention.positions == "rotary":
                    _rotate(builder, part, attention, at - start)
        for at, size in chunks:
            source = Rows(builder.input, at, size)
            if len(chunks) > 1:
                # Of several chunks only the last one's would still be there.
                normed = _norm(builder, "attention_norm", norm, source)
            query = builder.linear(
                "query",
                normed,
                builder.new("query", size, attention.heads * attention.head_dim),
            )
            attended = _attend(builder, query, key, value, attention, at - start)
            builder.linear(
                "output",
                attended,
                Rows(builder.output, at, size),
                residual=normed if residual_is_norm else source,
            )


def mlp_block(
    builder: Builder,
    norm: Mapping[str, Value],
    activation: str,
    gated: bool,
    residual_is_norm: bool,
) -> None:
    """norm → MLP → residual, for all tokens, where the attention's output lies."""
    width = builder.matrices["up"].rows
    for at, size in builder.chunks(0, builder.shape.tokens):
        states = Rows(builder.output, at, size)
        normed = _norm(builder, "mlp_norm", norm, states)
        inner = builder.new("inner", size, width)
        if gated:
            builder.linear("up", normed, inner)
            builder.linear("gate", normed, inner, activation, factor=inner)
        else:
            builder.linear("up", normed, inner, activation)
        builder.linear("down", inner, states, residual=normed if residual_is_norm else states)


def _norm(builder: Builder, name: str, norm: Mapping[str, Value], x: Rows) -> Rows:
    """A normalised copy. `norm` has the kernel's name and its epsilon."""
    out = builder.new("normed", x.count, builder.hidden_size)
    kernel = str(norm["kernel"])
    weights = {"weight": f"{name}.weight"}
    if kernel == "layer_norm":
        weights["bias"] = f"{name}.bias"
    builder.step(kernel, {"x": x}, {"out": out}, weights, {"eps": norm["eps"]})
    return out


def _rotate(builder: Builder, x: Rows, attention: Attention, start: int) -> None:
    builder.step(
        "rotary",
        {"x": x},
        {"out": x},
        {"frequencies": "rotary.frequencies"},
        {"head_dim": attention.head_dim, "start": start, "seq_len": builder.shape.seq_len},
        (("x", "out"),),
    )


def _attend(
    builder: Builder, query: Rows, key: Rows, value: Rows, attention: Attention, start: int
) -> Rows:
    """Attention of a chunk of queries, from row `start` of the keys on, over the keys before."""
    seq_len = builder.shape.seq_len
    several = key.count > seq_len
    # One sequence's chunk sees the keys up to its own last row; of several, each is whole.
    seen = key.count if several else start + query.count
    weights = {
        "rotary": {"frequencies": "rotary.frequencies"},
        "alibi": {"slopes": "alibi.slopes"},
    }[attention.positions]
    out = builder.new("attended", query.count, attention.heads * attention.head_dim)
    builder.step(
        "attention",
        {"query": query, "key": Rows(key.buffer, 0, seen), "value": Rows(value.buffer, 0, seen)},
        {"out": out},
        weights,
        {
            "sequences": key.count // seq_len if several else 1,
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            # Rounding to 8 bits is a step function: it would make much of a small difference.
            "exact": builder.activation is not None,
        },
        (("query", "out"),),
    )
    return out
