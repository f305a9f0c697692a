"""A compiled layer's schedule for people: kernels, tiles, traffic.

All numbers here are predicted, from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memladder.core.units import mib
from memladder.engine.compile.compile import Result
from memladder.engine.compile.tiles import connection, cut
from memladder.engine.compile.traffic import Traffic, weight_sizes
from memladder.engine.graph.nodes import Input
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import Rows, Step


def markdown(found: Result, model: str, engine: str) -> str:
    """`schedule.md`."""
    shape, program = found.graph.shape, found.program
    sizes = weight_sizes(found.form)
    at_once = found.form.program(shape, found.activation, chunk=shape.tokens)
    traffic = [Traffic(found.form, one) for one in (at_once, program)]
    whole, chunked = (one.fused() for one in traffic)
    unfused, unfused_chunked = (one.unfused(found.graph) for one in traffic)
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
        "## Fused steps",
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
            f"| {mib(Traffic(found.form, program).fused()):,.1f} |"
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
    traffic = Traffic(found.form, found.program)
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
        size = max(map(traffic.of, steps))
        yield (
            f"| {called} | {len(steps)} | {', '.join(_buffers(step.reads))} ({rows} rows) "
            f"| {', '.join(matrices)} | {', '.join(_buffers(step.writes))} | {tile} | {waves} "
            f"| {mib(size):,.1f} |"
        )


def _buffers(rows: Mapping[str, Rows]) -> list[str]:
    """Buffers without the number that tells chunks apart."""
    return list(dict.fromkeys(part.buffer.partition(".")[0] for part in rows.values()))
