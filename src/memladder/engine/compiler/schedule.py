"""A compiled layer's schedule for people: kernels, tiles, traffic, and the arena as a picture.

All numbers here are predicted, from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from xml.sax.saxutils import escape

from memladder.engine.compiler.compile import Result
from memladder.engine.compiler.lower import lower
from memladder.engine.compiler.tiles import ITEM_BYTES, connection, cut
from memladder.engine.graph.nodes import Attention, Graph, Input, Linear
from memladder.engine.plan import Plan
from memladder.engine.program import Program, Rows, Step
from memladder.kernels.packed import matrix_bytes
from memladder.units import mib

# Okabe and Ito 2008: told apart by everyone.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT = 960, 420, 90, 30, 170


def weight_sizes(found: Result) -> dict[str, int]:
    """Bytes of everything that a step may read by name."""
    sizes = {
        name: matrix_bytes(found.formats[name], len(weight.rows), weight.columns)
        for name, weight in found.fused.matrices.items()
    }
    sizes |= {name: 2 * len(vector) for name, vector in found.fused.vectors.items()}
    return sizes | {name: 4 * len(vector) for name, vector in found.fused.constants.items()}


def step_bytes(program: Program, step: Step, sizes: Mapping[str, int]) -> int:
    """Bytes that a step must read and write: each of its operands once."""
    buffers = {buffer.name: buffer for buffer in program.buffers}

    def size(rows: Rows) -> int:
        buffer = buffers[rows.buffer]
        return buffer.nbytes // buffer.rows * rows.count

    moved = sum(map(size, (*step.reads.values(), *step.writes.values())))
    return moved + sum(sizes[name] for name in step.weights.values())


def unfused_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """The same if each operator were a kernel of its own over all tokens, without chunks: values go
    through global memory in fp16; attention writes its scores, and reads and writes them as
    softmax, and reads them again. Weights are read once."""
    tokens, moved = graph.shape.tokens, sum(sizes.values())
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
    sizes, program = weight_sizes(found), program or found.program
    return sum(step_bytes(program, step, sizes) for step in program.steps)


def markdown(found: Result, model: str, engine: str) -> str:
    """`schedule.md`."""
    shape, program = found.graph.shape, found.program
    sizes = weight_sizes(found)
    unfused = unfused_bytes(found.graph, sizes)
    whole = fused_bytes(found, lower(found.fused, found.activation, chunk=shape.tokens))
    activation = "fp16" if found.activation is None else str(found.activation)
    lines = [
        f"# {model}, compiled by {engine}",
        "",
        f"Batch {shape.batch_size} × {shape.seq_len} tokens; weights {found.format}, activations "
        f"{activation}; chunks of {found.chunk} tokens at least. "
        "All numbers are predicted from shapes, none is measured.",
        "",
        "| | MiB |",
        "|---|---:|",
        f"| weights | {mib(sum(sizes.values())):,.1f} |",
        f"| arena | {mib(found.plan.nbytes):,.1f} |",
        f"| least that any plan of this program takes | {mib(found.plan.lower_bound):,.1f} |",
        f"| traffic of the program | {mib(fused_bytes(found)):,.1f} |",
        f"| traffic of the same kernels on all tokens at once | {mib(whole):,.1f} |",
        f"| traffic if every operator were a kernel, scores in memory | {mib(unfused):,.1f} |",
        "",
        f"{len(program.steps)} launches. On all tokens at once the kernels move "
        f"{whole / unfused:.2f} of what unfused operators would; chunks read weights again, for "
        "the sake of the arena.",
        "",
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
        matrices = [name for name in step.weights.values() if name in found.fused.matrices]
        if matrices:
            weights = [found.fused.matrices[name] for name in matrices]
            columns = sum(len(weight.rows) for weight in weights)
            best = cut(rows, columns, weights[0].columns, sum(sizes[name] for name in matrices))
            tile, waves = f"{best.rows} × {best.columns}", f"{best.waves:.1f}"
        called = step.kernel + "".join(
            f" {step.values[name]}" for name in ("activation", "function") if step.values.get(name)
        )
        size = max(step_bytes(found.program, other, sizes) for other in steps)
        yield (
            f"| {called} | {len(steps)} | {', '.join(_buffers(step.reads))} ({rows} rows) "
            f"| {', '.join(matrices)} | {', '.join(_buffers(step.writes))} | {tile} | {waves} "
            f"| {mib(size):,.1f} |"
        )


def _buffers(rows: Mapping[str, Rows]) -> list[str]:
    """Buffers without the number that tells chunks apart."""
    return list(dict.fromkeys(part.buffer.partition(".")[0] for part in rows.values()))


def arena_svg(program: Program, planned: Plan) -> str:
    """Buffers as boxes: steps to the right, bytes upwards."""
    lifetimes = program.lifetimes()
    steps, top = len(program.steps), max(planned.nbytes, 1)
    stems = list(dict.fromkeys(b.name.partition(".")[0] for b in program.buffers))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - 50
    for buffer in program.buffers:
        if buffer.name not in lifetimes:
            continue
        first, last = lifetimes[buffer.name]
        x = _LEFT + width * max(first, 0) / steps
        right = _LEFT + width * min(last + 1, steps) / steps
        tall = max(height * buffer.nbytes / top, 0.5)
        y = _TOP + height * (1 - planned.offsets[buffer.name] / top) - tall
        colour = _COLOURS[stems.index(buffer.name.partition(".")[0]) % len(_COLOURS)]
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{tall:.1f}" '
            f'fill="{colour}" fill-opacity="0.75" stroke="white" stroke-width="0.5">'
            f"<title>{escape(buffer.name)}: {mib(buffer.nbytes):,.2f} MiB, "
            f"steps {first} to {last}</title></rect>"
        )
    parts += _axes(steps, planned.nbytes, width, height)
    for number, stem in enumerate(stems):
        y = _TOP + 10 + 20 * number
        colour = _COLOURS[number % len(_COLOURS)]
        left = _LEFT + width + 20
        parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18}" y="{y}">{escape(stem)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(steps: int, nbytes: int, width: int, height: int) -> Iterator[str]:
    bottom = _TOP + height
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{_LEFT + width}" fill="none" stroke="black"/>'
    for part in (0, 1, 2, 3, 4):
        y = bottom - height * part / 4
        yield (
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{mib(nbytes * part // 4):,.2f}</text>"
        )
    for step in sorted({0, steps // 2, steps}):
        x = _LEFT + width * step / steps
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>'
    yield f'<text x="{_LEFT + width / 2}" y="{bottom + 38}" text-anchor="middle">step</text>'
    yield f'<text x="{_LEFT - 8}" y="{_TOP - 12}" text-anchor="end">arena, MiB</text>'
