"""How fast ladder's layers are on this GPU, against what bounds them and against others.

    python benchmarks/layers.py [--output FILE.md] [--models llama,bloom] [--without-peers]

One run, one GPU, side by side. A case is timed only after its output has agreed with the naive
kernels on the same quantised weights, from poisoned memory, twice bit by bit. Times are medians of
replays of the same CUDA graph that `memladder` measures. Exit status 1 where a gate does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder import formats, models
from memladder.case import Shape
from memladder.engine import packed_layer, packing, programs
from memladder.engine.driver import Graph
from memladder.engine.execute import Execution, arena_bytes
from memladder.engine.plan import plan
from memladder.engine.program import Program
from memladder.formats.base import Format
from memladder.kernels import cuda, naive
from memladder.models.cache import default_dir
from memladder.models.weights import hidden_states

DEVICE = torch.device("cuda", 0)
ROWS = [("fp16", "fp16"), ("int4", "fp16"), ("nf4", "fp16"), ("fp8", "fp8"), ("mxfp8", "mxfp8"),
        ("int1", "int8")]  # fmt: skip
SHAPES = (Shape(1, 1), Shape(32, 1), Shape(1, 4096))
# Of ‖y − naive‖ / ‖naive‖.
GATE = {"fp16": 2e-3, "fp8": 1e-2, "mxfp8": 1e-2, "int8": 1e-2}
PRODUCTS = ("qkv", "matmul", "glu")


@dataclass(frozen=True)
class Rates:
    """What this GPU does at best: bytes and operations a second, by the operands of a product."""

    copy: float
    products: dict[str, float]


@dataclass(frozen=True)
class Timed:
    """Seconds of a layer, of its products alone; its error; bytes and operations that it needs."""

    layer_s: float
    products_s: float
    error: float
    weight_bytes: int
    operations: float


def graphed(launch: Callable[[], object], repeats: int = 25) -> float:
    """Median time of some launches as a graph."""
    graph = Graph(lambda: (launch(), None)[1], DEVICE)
    found = graph.seconds(repeats)
    graph.close()
    return found


@triton.jit
def _copy(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at))


def rates() -> Rates:
    """Measured: the faster of two ways to copy 1 GiB, and the library's products of 8192³."""
    size = 1 << 28
    source, target = (torch.randint(2**31, (size,), dtype=torch.int32, device=DEVICE) for _ in "ab")
    times = [
        graphed(lambda: target.copy_(source)),
        graphed(lambda: _copy[(size // 4096,)](source, target, SIZE=4096, num_warps=8)),
    ]
    n = 8192
    x, y = (torch.randn(n, n, device=DEVICE, dtype=torch.float16) for _ in "ab")
    x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    i8, j8 = (x * 30).to(torch.int8), (y * 30).to(torch.int8)
    products = {
        "fp16": lambda: torch.mm(x, y.t()),
        "fp8": lambda: torch._scaled_mm(x8, y8.t(), one, one, out_dtype=torch.float16),
        "int8": lambda: torch._int_mm(i8, j8.t()),
    }
    found = {name: 2 * n**3 / graphed(call, 10) for name, call in products.items()}
    found["mxfp8"] = found["fp8"]
    return Rates(2 * 4 * size / min(times), found)


def operations(model: str, shape: Shape) -> float:
    """Multiplications and additions of the products, and of attention over what is seen."""
    config = models.layer_config(model)
    definition = programs.definition(model)
    matrices = definition.matrices(config.values)
    weights = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    width = matrices["query"].rows
    pairs = shape.batch_size * shape.seq_len * (shape.seq_len + 1) / 2
    return 2.0 * weights * shape.tokens + 4.0 * width * pairs


def timed(model: str, weight: str, activation: str, shape: Shape) -> Timed:
    """Gate and time one case. Raises AssertionError where the gate does not hold."""
    config = models.layer_config(model)
    kind: Format | None = None if activation == "fp16" else formats.get(activation)
    path = packing.ensure(config, formats.get(weight), default_dir(), 0)
    host = packed_layer.load(path)
    block = torch.empty(packed_layer.device_bytes(host), dtype=torch.uint8, device=DEVICE)
    layer = packed_layer.on_device(host, block)
    program: Program = programs.definition(model).program(config.values, shape, kind)
    planned = plan(program)
    size = arena_bytes(program, planned, cuda)
    arena = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    states = torch.from_numpy(hidden_states(config, shape, 0)).view(shape.tokens, -1).to(DEVICE)

    def output(kernels: object) -> Tensor:
        # NaN everywhere: what is not written shows.
        arena.fill_(255)
        execution = Execution(program, planned, layer, kernels, arena)  # type: ignore[arg-type]
        execution.input.copy_(states)
        execution.run()
        return execution.output.clone()

    expected = output(naive).double()
    found, again = output(cuda), output(cuda)
    error = float((found.double() - expected).norm() / expected.norm())
    name = f"{model} {weight} {activation} {shape}"
    assert torch.equal(found, again), f"{name}: two runs differ"
    assert error <= GATE[activation], f"{name}: error {error:.1e}"
    execution = Execution(program, planned, layer, cuda, arena)
    graph = Graph(execution.run, DEVICE)
    alone = Execution(
        program, planned, layer, cuda, arena, only=lambda step: step.kernel in PRODUCTS
    )
    times = graph.seconds(), graphed(alone.run)
    graph.close()
    nbytes = sum(matrix.nbytes for matrix in layer.matrices.values())
    return Timed(*times, error, nbytes, operations(model, shape))


def inductor(model: str, shape: Shape) -> float:
    """Seconds of PyTorch-Inductor's layer, as `memladder` measures its memory."""
    from memladder import frameworks
    from memladder.case import Case
    from memladder.frameworks.base import Job

    job = Job(Case(model, "pytorch", shape, "cuda:0"), models.layer_config(model), default_dir())
    framework = frameworks.get("pytorch")
    framework.prepare(job)
    session = framework.session(job, lambda _: None)
    session.context()
    session.weights()
    session.compile()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        session.run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def marlin(model: str, shape: Shape) -> float:
    """Seconds of vLLM's Marlin on the layer's matrices, q, k, v and gate, up as one each."""
    import peers

    matrices = programs.definition(model).matrices(models.layer_config(model).values)
    rows = {name: matrix.rows for name, matrix in matrices.items()}
    sizes = [
        (rows["query"] + rows["key"] + rows["value"], matrices["query"].columns),
        (rows["output"], matrices["output"].columns),
        (rows["up"] + rows.get("gate", 0), matrices["up"].columns),
        (rows["down"], matrices["down"].columns),
    ]
    calls = [(peers.marlin(n, k, 128), k) for n, k in sizes]
    inputs = {k: torch.randn(shape.tokens, k, device=DEVICE, dtype=torch.float16) for _, k in calls}

    def launch() -> None:
        for call, k in calls:
            call(inputs[k])

    return graphed(launch)


def main(arguments: list[str]) -> int:
    """Gate, time, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,bloom")
    parser.add_argument("--formats", default=",".join(weight for weight, _ in ROWS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--without-peers", action="store_true")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    best = rates()
    lines = [
        f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, "
        f"Triton {triton.__version__}. Copy: {best.copy / 1e12:.2f} TB/s. Library's products of "
        "8192³: "
        + ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in best.products.items())
        + " TFLOP/s.",
        "",
        "| layer | shape | weights | activations | µs | bytes' floor, µs | flops' floor, µs "
        "| layer / higher floor | products, µs | products / bytes' floor | error |",
        "|---|---|---|---|" + "---:|" * 7,
    ]
    print(*lines, sep="\n", flush=True)
    holds = True
    found: dict[tuple[str, str, Shape], Timed] = {}
    for model in options.models.split(","):
        for weight, activation in ROWS:
            if weight not in options.formats.split(","):
                continue
            for shape in SHAPES:
                try:
                    one = timed(model, weight, activation, shape)
                except AssertionError as error:
                    holds = False
                    lines.append(f"| {model} | {shape} | {weight} | {activation} | {error} |")
                else:
                    found[model, weight, shape] = one
                    lines.append(row(model, weight, activation, shape, one, best))
                print(lines[-1], flush=True)
                torch.cuda.empty_cache()
    lines += ["", *compared(found, best, options.without_peers)]
    print(*lines[lines.index("", 4) :], sep="\n")
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")
    return 0 if holds else 1


def row(model: str, weight: str, activation: str, shape: Shape, one: Timed, best: Rates) -> str:
    """A line of the table."""
    read = one.weight_bytes / best.copy
    compute = one.operations / best.products[activation]
    return (
        f"| {model} | {shape} | {weight} | {activation} | {1e6 * one.layer_s:.1f} "
        f"| {1e6 * read:.1f} | {1e6 * compute:.1f} | {one.layer_s / max(read, compute):.2f} "
        f"| {1e6 * one.products_s:.1f} | {one.products_s / read:.2f} | {one.error:.1e} |"
    )


def compared(found: dict[tuple[str, str, Shape], Timed], best: Rates, alone: bool) -> list[str]:
    """The goals, each with what was measured."""
    one, few, many = SHAPES
    lines = ["| what | against | goal | measured | holds |", "|---|---|---:|---:|---|"]

    def goal(what: str, against: str, least: float, ratio: float, most: bool = False) -> None:
        good = ratio <= least if most else ratio >= least
        sign = "≤" if most else "≥"
        lines.append(
            f"| {what} | {against} | {sign} {least:.2f} | {ratio:.2f} | {'yes' if good else 'NO'} |"
        )

    for model in sorted({model for model, _, _ in found}):
        times = {(weight, shape): t for (own, weight, shape), t in found.items() if own == model}
        for weight, _ in ROWS:
            if (single := times.get((weight, one))) is not None:
                read = single.weight_bytes / best.copy
                least = 0.6 if weight == "int1" else 0.9
                goal(f"{model} {weight}: matrices at batch 1", "copy", least,
                     read / single.products_s)  # fmt: skip
                least = 2.0 if weight == "int1" else 1.25
                goal(f"{model} {weight}: layer 1x1", "read time", least,
                     single.layer_s / read, most=True)  # fmt: skip
        base = times.get(("fp16", many))
        for weight, least in (("int4", 0.9), ("nf4", 0.9), ("fp8", 1.5), ("mxfp8", 1.0),
                              ("int1", 1.5)):  # fmt: skip
            if base is not None and (other := times.get((weight, many))) is not None:
                goal(f"{model} {weight}: layer 1x4096", "ladder fp16", least,
                     base.layer_s / other.layer_s)  # fmt: skip
        if alone:
            continue
        if base is not None:
            other_s = inductor(model, many)
            goal(f"{model} fp16: layer 1x4096, {1e3 * base.layer_s:.2f} ms",
                 f"PyTorch-Inductor, {1e3 * other_s:.2f} ms", 1.0,
                 other_s / base.layer_s)  # fmt: skip
        for shape in (few, one):
            if (own := times.get(("int4", shape))) is not None:
                try:
                    other_s = marlin(model, shape)
                except Exception as error:  # a peer that is not here is told, and misses nothing
                    lines.append(f"| {model} int4: layer {shape} | Marlin: {error} | | | |")
                    continue
                goal(f"{model} int4: layer {shape}, {1e6 * own.layer_s:.1f} µs",
                     f"Marlin's matrices alone, {1e6 * other_s:.1f} µs", 1.0,
                     other_s / own.layer_s)  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
