"""Many layers as one program: embeddings, layers in order, norm and head.

A layer's program is written once for all layers that are alike; here each gets its own names, so
that one plan places all of them in one arena. `3.query` is a matrix of layer 3, `3.keys` its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from memladder.core.case import Workload
from memladder.engine.program.cache import POSITIONS
from memladder.engine.program.steps import Buffer, Program, Rows, Step, Value
from memladder.models.ends import Ends, Norm

IDS, GIVEN, STATES, LOGITS = "ids", "given", "states", "logits"
# Read besides the layers' own: two matrices, and vectors.
EMBEDDING, HEAD = "embedding", "head"
HEAD_BIAS, LEARNED, NUMBERS = "head.bias", "positions", "embedding.numbers"


@dataclass(frozen=True)
class Around:
    """What of a model's ends a program has, and the tensors of the packed rest that it may read.

    `first`: from ids int32 [tokens, 1], and not from hidden states. `last`: to logits float32
    [sequences, vocabulary] of each sequence's last new token, and not to hidden states; `every`: of
    all tokens.
    """

    ends: Ends
    held: frozenset[str]
    first: bool = True
    last: bool = True
    every: bool = False


def join(layers: Iterable[tuple[int, Program]], around: Around, shape: Workload) -> Program:
    """Layers by their numbers, each with its program at that shape, which has a cache."""
    joined = _Joined(around, shape)
    joined.begin()
    for number, program in layers:
        joined.add(number, program)
    joined.end()
    return joined.program()


class _Joined:
    """A program in the making."""

    def __init__(self, around: Around, shape: Workload) -> None:
        self._around, self._shape = around, shape
        self._width = around.ends.hidden_size
        self._buffers = [Buffer(STATES, shape.tokens, self._width)]
        self._steps: list[Step] = []
        self._state: list[Buffer] = []
        self._scalars = [Buffer(POSITIONS, shape.batch_size, 3, "int32")]
        self._input = STATES
        self._states = Rows(STATES, 0, shape.tokens)
        self._output = STATES

    def program(self) -> Program:
        return Program(
            tuple(self._buffers),
            tuple(self._steps),
            self._input,
            self._output,
            tuple(self._state),
            tuple(self._scalars),
        )

    def begin(self) -> None:
        """Hidden states of ids."""
        around, ends = self._around, self._around.ends
        if not around.first:
            # Layers write over their input, which is the caller's.
            self._input = GIVEN
            given = self._new(GIVEN, self._shape.tokens, self._width)
            values: dict[str, Value] = {"function": "scale", "number": 1.0}
            self._step("pointwise", {"x": given}, self._states, {}, values)
            return
        self._buffers.append(Buffer(IDS, self._shape.tokens, 1, "int32"))
        self._input = IDS
        weights = {"weight": EMBEDDING}
        if NUMBERS in around.held:
            weights["numbers"] = NUMBERS
        ids = Rows(IDS, 0, self._shape.tokens)
        values = {"factor": ends.factor}
        self._step("embed", {"ids": ids}, self._states, weights, values)
        if ends.positions is not None:
            reads = {"x": self._states, "positions": self._positions()}
            values = {"start": 0, "offset": ends.offset}
            self._step("add_positions", reads, self._states, {"table": LEARNED}, values)
        if ends.embedding_norm is not None:
            self._norm("embedding_norm", ends.embedding_norm, self._states)

    def add(self, number: int, program: Program) -> None:
        """A layer: its input is where the states are."""
        names = {program.input: self._states.buffer, POSITIONS: POSITIONS}

        def own(name: str) -> str:
            return names.get(name, f"{number}.{name}")

        self._buffers += [
            replace(buffer, name=own(buffer.name))
            for buffer in program.buffers
            if buffer.name != program.input
        ]
        self._state += [replace(buffer, name=own(buffer.name)) for buffer in program.state]
        for step in program.steps:
            reads, writes = (_renamed(rows, own) for rows in (step.reads, step.writes))
            weights = {name: f"{number}.{key}" for name, key in step.weights.items()}
            self._steps.append(replace(step, reads=reads, writes=writes, weights=weights))
        self._states = Rows(own(program.output), 0, self._shape.tokens)
        self._output = self._states.buffer

    def end(self) -> None:
        """Logits."""
        around, ends, shape = self._around, self._around.ends, self._shape
        if not around.last:
            return
        x = self._states
        if not around.every and shape.seq_len > 1:
            x = self._new("last", shape.batch_size, self._width)
            self._step("last_rows", {"x": self._states, "positions": self._positions()}, x)
        if ends.final_norm is not None:
            self._norm("final_norm", ends.final_norm, x)
        out = self._new(LOGITS, x.count, ends.vocabulary, "float32")
        weights = {"weight": EMBEDDING if ends.is_tied else HEAD}
        if ends.head_bias is not None:
            weights["bias"] = HEAD_BIAS
        self._step("matmul", {"x": x}, out, weights)
        if ends.softcap or ends.logit_factor != 1.0:
            values: dict[str, Value] = {"factor": ends.logit_factor, "softcap": ends.softcap}
            self._step("cap_logits", {"x": out}, out, {}, values)
        self._output = LOGITS

    def _norm(self, name: str, norm: Norm, x: Rows) -> None:
        weights = {"weight": f"{name}.weight"}
        if norm.kind == "layer":
            weights["bias"] = f"{name}.bias"
        self._step(f"{norm.kind}_norm", {"x": x}, x, weights, {"eps": norm.eps})

    def _new(self, name: str, rows: int, columns: int, dtype: str = "float16") -> Rows:
        self._buffers.append(Buffer(name, rows, columns, dtype))
        return Rows(name, 0, rows)

    def _step(
        self,
        kernel: str,
        reads: Mapping[str, Rows],
        out: Rows,
        weights: Mapping[str, str] | None = None,
        values: Mapping[str, Value] | None = None,
    ) -> None:
        self._steps.append(Step(kernel, reads, {"out": out}, weights or {}, values or {}))

    def _positions(self) -> Rows:
        return Rows(POSITIONS, 0, self._shape.batch_size)


def _renamed(rows: Mapping[str, Rows], own: Callable[[str], str]) -> dict[str, Rows]:
    return {argument: replace(part, buffer=own(part.buffer)) for argument, part in rows.items()}
