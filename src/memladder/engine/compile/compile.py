"""From an ONNX file to a program: what `memladder compile` and the engines' rows do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from memladder import formats
from memladder.core.case import Workload
from memladder.core.errors import GraphError, UsageError
from memladder.engine.compile.fuse import fuse
from memladder.engine.compile.traffic import Traffic
from memladder.engine.frontend import convert
from memladder.engine.frontend.guard import blamed
from memladder.engine.graph.fused import Parameters
from memladder.engine.graph.nodes import Graph
from memladder.engine.packed.packed_layer import Form
from memladder.engine.program.builder import TILE
from memladder.engine.program.plan import ArenaPlan, plan
from memladder.engine.program.steps import CHUNK, Program
from memladder.formats._shared.base import Format

ENGINES = ("welder", "ladder")
_MOST_CHUNKS = 64


@dataclass(frozen=True)
class CompileOptions:
    """How a layer is compiled. `welder` fuses and does nothing else: fp16 only.

    activation: a format's key, None for the one that the figure pairs with the weights'. kept:
    patterns of matrices that stay in fp16. budget: bytes of the arena, None for the knee. in_place:
    whether the output may overwrite the input.
    """

    engine: str = "ladder"
    format: str = "fp16"
    activation: str | None = None
    kept: tuple[str, ...] = ()
    budget: int | None = None
    in_place: bool = True


@dataclass(frozen=True)
class Result:
    """All that is known of a compiled layer but its weights' bytes."""

    graph: Graph
    form: Form
    parameters: Parameters
    activation: Format | None
    program: Program
    plan: ArenaPlan
    chunk: int
    options: CompileOptions


def compile_file(path: Path, options: CompileOptions) -> Result:
    """Raises GraphError for what can't be compiled, UsageError and FormatError for options."""
    if options.engine not in ENGINES:
        raise UsageError(f"unknown engine {options.engine!r}; known: {', '.join(ENGINES)}")
    kind = formats.get(options.format)
    if options.engine == "welder" and (
        str(kind) != "fp16" or options.activation not in (None, "fp16")
    ):
        raise UsageError("welder fuses and has no number format but fp16; ladder has others")
    activation = formats.get(options.activation or kind.activation)
    if not activation.is_activation:
        allowed = ", ".join(key for key in formats.names() if formats.get(key).is_activation)
        raise UsageError(f"{options.activation} is no activation format; allowed: {allowed}")
    rounded = None if activation.bits == 16 else activation
    graph = convert.load(path)
    with blamed(f"{path}: this graph"):
        fused, parameters = fuse(graph)
    kept = _kept(parameters, options.kept)
    form = Form(fused, kind, dict.fromkeys(kept, formats.get("fp16")), graph.shape)
    with blamed(f"{path}: this graph"):
        program, planned, chunk = within(
            form, graph.shape, rounded, options.budget, options.in_place
        )
    if not program.steps:
        raise GraphError(f"{path}: the output is the hidden states as they are: no step to compile")
    return Result(graph, form, parameters, rounded, program, planned, chunk, options)


def _kept(parameters: Parameters, patterns: tuple[str, ...]) -> list[str]:
    """Matrices whose name fits a pattern: the engine's name (`query`, `down`), or the model's
    (`self_attn.q_proj.weight`). Raises UsageError for a pattern that fits none."""
    names = {name: (name, weight.array.name) for name, weight in parameters.matrices.items()}
    for pattern in patterns:
        if not any(fnmatchcase(known, pattern) for both in names.values() for known in both):
            raise UsageError(
                f"no matrix is called {pattern!r}; there are: "
                f"{', '.join(f'{name} ({source})' for name, source in names.values())}"
            )
    return [
        name
        for name, both in names.items()
        if any(fnmatchcase(known, pattern) for pattern in patterns for known in both)
    ]


def within(
    form: Form, shape: Workload, activation: Format | None, budget: int | None, in_place: bool
) -> tuple[Program, ArenaPlan, int]:
    """The program of a chunk whose arena is within the budget; without one, of the knee.

    Of the longest, and of shorter ones as long as they move fewer bytes: what long chunks save in
    weights they may read again in activations. Raises UsageError with the least that is needed if
    no chunk is within the budget.
    """
    if budget is None:
        program = form.program(shape, activation, in_place=in_place)
        return program, plan(program), CHUNK
    best: tuple[Program, ArenaPlan, int] | None = None
    for chunk in _chunks(shape.tokens):
        program = form.program(shape, activation, chunk=chunk, budget=budget, in_place=in_place)
        planned = plan(program)
        if planned.nbytes > budget:
            continue
        if best is not None and _moved(form, program) >= _moved(form, best[0]):
            break
        best = program, planned, chunk
    if best is None:
        raise UsageError(
            f"a memory budget of {budget:,} bytes is too small: {planned.nbytes:,} are the least"
        )
    return best


def _moved(form: Form, program: Program) -> int:
    return Traffic(form, program).fused()


def _chunks(tokens: int) -> list[int]:
    """Lengths of chunks that are worth a try, the longest first: whole tiles that divide the tokens
    evenly, and what is shorter than a tile. Those below 16 read all weights for a few tokens."""
    whole = {math.ceil(tokens / count / TILE) * TILE for count in range(1, _MOST_CHUNKS + 1)}
    return sorted(whole | {TILE >> i for i in range(4)}, reverse=True)
