"""A compiled layer's schedule for people: kernels, tiles, traffic.

All numbers here are predicted, from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memladder.engine.compiler.compile import Result
from memladder.engine.compiler.tiles import ITEM_BYTES, connection, cut
from memladder.engine.graph.nodes import Attention, Graph, Input, Linear
from memladder.engine.packed_layer import Form
from memladder.engine.plan import plan
from memladder.engine.program import Program, Rows, Step
from memladder.kernels.packed import matrix_bytes
from memladder.units import mib


def weight_sizes(form: Form) -> dict[str, int]:
    """Bytes of everything that a step may read by name."""
    fused = form.fused
    sizes = {
        name: matrix_bytes(form.format_of(name), *size) for name, size in fused.matrices.items()
    }
    sizes |= {name: 2 * size for name, size in fused.vectors.items()}
    return sizes | {name: 4 * size for name, size in fused.constants.items()}


Matrices = Mapping[str, tuple[int, int]]


def step_bytes(program: Program, step: Step, sizes: Mapping[str, int], matrices: Matrices) -> int:
    """Bytes that a step reads and writes: each of its operands once, and a product's activation
    again where it does not stay in the cache."""
    operands = (*step.reads.values(), *step.writes.values())
    moved = sum(_size(program, rows) for rows in operands)
    moved += sum(sizes[name] for name in step.weights.values())
    return moved + _read_again(program, step, sizes, matrices, apart=False)


def _size(program: Program, rows: Rows) -> int:
    buffer = next(buffer for buffer in program.buffers if buffer.name == rows.buffer)
    return buffer.nbytes // buffer.rows * rows.count


def _read_again(
    program: Program, step: Step, sizes: Mapping[str, int], matrices: Matrices, *, apart: bool
) -> int:
    """Bytes of a product's activation beyond its first reading: of all matrices as one product, or
    of each `apart`."""
    names = [name for name in step.weights.values() if name in matrices]
    groups = [[name] for name in names] if apart else [names] if names else []
    reads = 0
    for group in groups:
        rows, k = step.reads["x"].count, matrices[group[0]][1]
        columns = sum(matrices[name][0] for name in group)
        reads += cut(rows, columns, k, sum(sizes[name] for name in group)).reads - 1
    return reads * _size(program, step.reads["x"]) if groups else 0


def unfused_bytes(
    graph: Graph, program: Program, sizes: Mapping[str, int], matrices: Matrices
) -> int:
    """The same if each operator were a kernel of its own, in the chunks of the program: values go
    through global memory in fp16; attention writes its scores, and reads and writes them as
    softmax, and reads them again. Weights are read as often as the program does."""
    tokens = graph.shape.tokens
    moved = sum(
        sum(sizes[name] for name in step.weights.values())
        + _read_again(program, step, sizes, matrices, apart=True)
        for step in program.steps
    )
    for node in graph.nodes():
        if isinstance(node, Input):
            continue
        columns = node.columns + sum(x.columns for x in node.inputs)
        if isinstance(node, Linear) and node.bias is not None:
            columns += 2 * node.columns
        moved += tokens * columns * ITEM_BYTES
        if isinstance(node, Attention):
            moved += 4 * node.heads * tokens * graph.shape.seq_len * ITEM_BYTES
    return moved


def fused_bytes(found: Result, program: Program | None = None) -> int:
    """Of the program, or of another one for the same layer: the sum over its steps."""
    sizes, program = weight_sizes(found.form), program or found.program
    matrices = found.form.fused.matrices
    return sum(step_bytes(program, step, sizes, matrices) for step in program.steps)


def markdown(found: Result, model: str, engine: str) -> str:
    """`schedule.md`."""
    shape, program = found.graph.shape, found.program
    sizes = weight_sizes(found.form)
    at_once = found.form.program(shape, found.activation, chunk=shape.tokens)
    whole, chunked = fused_bytes(found, at_once), fused_bytes(found)
    unfused, unfused_chunked = (
        unfused_bytes(found.graph, one, sizes, found.form.fused.matrices)
        for one in (at_once, program)
    )
    activation = "fp16" if found.activation is None else str(found.activation)
    lines = [
        f"# {model}, compiled by {engine}",
        "",
        f"Batch {shape.batch_size} × {shape.seq_len} tokens; weights {found.form.format}, "
        f"activations {activation}; chunks of {found.chunk} tokens at least. "
        "All numbers are predicted from shapes, none is measured.",
        "",
        "| | MiB |",
        "|---|---:|",
        f"| weights | {mib(sum(sizes.values())):,.1f} |",
        f"| arena | {mib(found.plan.nbytes):,.1f} |",
        f"| least that any plan of this program takes | {mib(found.plan.lower_bound):,.1f} |",
        "",
        f"{len(program.steps)} launches.",
        "",
        "## Traffic",
        "",
        "MiB from and to memory; what a product reads in each of its waves counts as often. "
        "Unfused: every operator is a kernel, attention's scores are in memory. Chunks read "
        "weights again, for the sake of the arena, and so would operators.",
        "",
        "| | all tokens at once | in the program's chunks |",
        "|---|---:|---:|",
        f"| unfused | {mib(unfused):,.1f} | {mib(unfused_chunked):,.1f} |",
        f"| fused | {mib(whole):,.1f} | {mib(chunked):,.1f} |",
        f"| fused / unfused | {whole / unfused:.2f} | {chunked / unfused_chunked:.2f} |",
        "",
        f"The program, in its chunks, moves {chunked / unfused:.2f} of what unfused operators "
        "move on all tokens at once.",
        "",
        *_chunks(found),
        "## What is joined",
        "",
        "Values of the graph that do not reach global memory, and where they stay:",
        "",
        *_joined(found),
        "",
        "## Kernels",
        "",
        "| kernel | launches | reads | weights | writes | tile | waves | MiB each |",
        "|---|---:|---|---|---|---|---:|---:|",
        *_kernels(found, sizes),
        "",
        "## Arena",
        "",
        "![Where buffers lie, step by step](arena.svg)",
        "",
    ]
    return "\n".join(lines)


def _chunks(found: Result) -> Iterator[str]:
    """What longer and shorter chunks would cost: what a budget chooses from."""
    shape, least = found.graph.shape, 128
    if shape.tokens <= least:
        return
    yield from ("Other chunks, which `--memory-budget` chooses from:", "")
    yield from (
        "| tokens at a time, at least | launches | arena, MiB | traffic, MiB |",
        "|---:" * 4 + "|",
    )
    lengths = [least << i for i in range(32) if least << i < shape.tokens]
    for chunk in (*lengths, shape.tokens):
        program = found.form.program(shape, found.activation, chunk=chunk)
        yield (
            f"| {chunk} | {len(program.steps)} | {mib(plan(program).nbytes):,.1f} "
            f"| {mib(fused_bytes(found, program)):,.1f} |"
        )
    yield ""


def _joined(found: Result) -> Iterator[str]:
    """Edges of the canonical graph inside one kernel, by the tile maps."""
    kept = {id(node) for node in found.graph.nodes()}
    names: dict[str, int] = {}
    for node in found.graph.nodes():
        for x in node.inputs:
            if id(x) not in kept or isinstance(x, Input):
                continue
            kinds = (type(x).__name__, type(node).__name__)
            if kinds in (("Linear", "Pointwise"), ("Pointwise", "Pointwise"), ("Linear", "Rotary")):
                where = connection(x, node, (128, 128))
                names_key = f"{kinds[0].lower()} → {_called(node)}: {where}"
                names[names_key] = names.get(names_key, 0) + 1
    yield from (
        f"- {name}{f' ({count} times)' if count > 1 else ''}" for name, count in names.items()
    )


def _called(node: object) -> str:
    return str(getattr(node, "function", type(node).__name__.lower()))


def _kernels(found: Result, sizes: Mapping[str, int]) -> Iterator[str]:
    """A row for each kind of step: chunks of the same size are one."""
    groups: dict[tuple[object, ...], list[Step]] = {}
    for step in found.program.steps:
        rows = next(iter(step.writes.values())).count
        key = (step.kernel, tuple(step.weights.values()), rows, tuple(step.writes))
        groups.setdefault(key, []).append(step)
    for steps in groups.values():
        step = steps[0]
        rows = next(iter(step.writes.values())).count
        tile, waves = "rows", ""
        matrices = [name for name in step.weights.values() if name in found.form.fused.matrices]
        if matrices:
            weights = [found.form.fused.matrices[name] for name in matrices]
            columns = sum(weight[0] for weight in weights)
            best = cut(rows, columns, weights[0][1], sum(sizes[name] for name in matrices))
            tile, waves = f"{best.rows} × {best.columns}", f"{best.waves:.1f}"
        called = step.kernel + "".join(
            f" {step.values[name]}" for name in ("activation", "function") if step.values.get(name)
        )
        size = max(
            step_bytes(found.program, other, sizes, found.form.fused.matrices) for other in steps
        )
        yield (
            f"| {called} | {len(steps)} | {', '.join(_buffers(step.reads))} ({rows} rows) "
            f"| {', '.join(matrices)} | {', '.join(_buffers(step.writes))} | {tile} | {waves} "
            f"| {mib(size):,.1f} |"
        )


def _buffers(rows: Mapping[str, Rows]) -> list[str]:
    """Buffers without the number that tells chunks apart."""
    return list(dict.fromkeys(part.buffer.partition(".")[0] for part in rows.values()))
