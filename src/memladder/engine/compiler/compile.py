"""From an ONNX file to a program: what `memladder compile` and the engines' rows do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memladder import formats
from memladder.engine.compiler.bundle import choose_formats
from memladder.engine.compiler.fuse import fuse
from memladder.engine.compiler.fused import Fused
from memladder.engine.compiler.lower import lower
from memladder.engine.graph import convert
from memladder.engine.graph.nodes import Graph
from memladder.engine.plan import Plan, plan
from memladder.engine.program import Program
from memladder.engine.programs.build import CHUNK
from memladder.errors import UsageError
from memladder.formats.base import Format

ENGINES = ("welder", "ladder")

# As in the figure: a weight format that comes with an activation format of its own.
ACTIVATIONS = {"fp8": "fp8", "mxfp8": "mxfp8", "int1": "int8"}


@dataclass(frozen=True)
class Options:
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
    fused: Fused
    format: Format
    formats: dict[str, Format]
    activation: Format | None
    program: Program
    plan: Plan
    chunk: int


def compile_file(path: Path, options: Options) -> Result:
    """Raises GraphError for what can't be compiled, UsageError and FormatError for options."""
    if options.engine not in ENGINES:
        raise UsageError(f"unknown engine {options.engine!r}; known: {', '.join(ENGINES)}")
    kind = formats.get(options.format)
    if options.engine == "welder" and (
        str(kind) != "fp16" or options.activation not in (None, "fp16")
    ):
        raise UsageError("welder fuses and has no number format but fp16; ladder has others")
    name = str(kind).partition(":")[0]
    activation = formats.get(options.activation or ACTIVATIONS.get(name, "fp16"))
    if not activation.is_activation:
        allowed = ", ".join(key for key in formats.names() if formats.get(key).is_activation)
        raise UsageError(f"{options.activation} is no activation format; allowed: {allowed}")
    rounded = None if activation.bits == 16 else activation
    if rounded is not None and options.kept:
        raise UsageError("matrices can be kept in fp16 only where activations are in fp16")
    graph = convert.load(path)
    fused = fuse(graph)
    kinds = choose_formats(fused, kind, options.kept)
    program, planned, chunk = within(fused, rounded, options.budget, options.in_place)
    return Result(graph, fused, kind, kinds, rounded, program, planned, chunk)


def within(
    fused: Fused, activation: Format | None, budget: int | None, in_place: bool
) -> tuple[Program, Plan, int]:
    """The program of the longest chunk whose arena is within the budget; without one, the knee.

    Raises UsageError with the least that is needed if none is.
    """
    if budget is None:
        program = lower(fused, activation, in_place=in_place)
        return program, plan(program), CHUNK
    chunk = 1
    while chunk < fused.shape.tokens:
        chunk *= 2
    while True:
        program = lower(fused, activation, chunk=chunk, in_place=in_place)
        planned = plan(program)
        if planned.nbytes <= budget:
            return program, planned, chunk
        if chunk <= _LEAST_CHUNK:
            raise UsageError(
                f"a memory budget of {budget:,} bytes is too small: "
                f"{planned.nbytes:,} are the least"
            )
        chunk //= 2


# Shorter chunks read all weights for a few tokens.
_LEAST_CHUNK = 16
