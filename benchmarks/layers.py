"""How fast ladder's layers are on this GPU, against what bounds them and against others.

    python benchmarks/layers.py [--output FILE.md] [--models llama,bloom] [--peers llama]

One run, one GPU, side by side, on random weights like those of `memladder.models.weights`. A case
is timed only after its output has agreed with the naive kernels on the same quantised weights, from
poisoned memory, twice bit by bit; with fp16 activations also with Hugging Face's layer in float32
on the dequantised weights. Times are medians of the CUDA graph that `memladder` measures, launched
again and again. Two that are compared at 4096 tokens are so twice: alone, each again and again, and
taking turns, because the GPU's clock follows the power that the last milliseconds took. Exit status
1 where a gate does not hold.
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
from memladder.core.case import Workload
from memladder.core.errors import UnavailableError
from memladder.engine.compile import layers
from memladder.engine.packed import packed_layer, reference
from memladder.engine.packed.packed_layer import Form, PackedLayer
from memladder.engine.program.plan import plan
from memladder.engine.run.driver import CudaGraph
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.formats._shared.base import Format
from memladder.kernels import cuda, naive
from memladder.kernels.layout import Layout
from memladder.models import reference as layer_reference
from memladder.models.cache import default_dir
from memladder.models.weights import hidden_states

DEVICE = torch.device("cuda", 0)
ROWS = [("fp16", "fp16"), ("int4", "fp16"), ("nf4", "fp16"), ("fp8", "fp8"), ("mxfp8", "mxfp8"),
        ("int1", "int8")]  # fmt: skip
SHAPES = (Workload(1, 1), Workload(32, 1), Workload(1, 4096))
# Of ‖y − naive‖ / ‖naive‖; with fp16 activations of PyTorch's float32 layer too.
GATE = {"fp16": 2e-3, "fp8": 1e-2, "mxfp8": 1e-2, "int8": 1e-2}
PRODUCTS = ("qkv", "matmul", "glu")
TURNS = 12
# Elements of a weight that are quantised at once.
BLOCK = 1 << 26


@dataclass(frozen=True)
class Rates:
    """What this GPU does at best: bytes and operations a second, by the operands of a product."""

    copy: float
    products: dict[str, float]


@dataclass(frozen=True)
class Timed:
    """Seconds of a layer, of its products alone; its error, and that against PyTorch's float32
    layer; bytes and operations that it needs; the layer itself, and what its graph works on."""

    layer_s: float
    products_s: float
    error: float
    float32_error: float | None
    weight_bytes: int
    operations: float
    layer: PackedLayer
    graph: CudaGraph
    execution: Execution


def packed(model: str, kind: Format) -> PackedLayer:
    """A layer of random weights, quantised and packed on the GPU."""
    compiled = layers.ensure(models.layer_config(model), default_dir())
    form = Form(compiled.fused, kind, {})
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=random, device=DEVICE).mul_(std).half()

    table = form.table
    found: dict[str, Tensor] = {}
    for name, (size, columns) in compiled.fused.matrices.items():
        layout = Layout.of(kind, size, columns)
        step = max(1, BLOCK // (columns * layout.tile_rows)) * layout.tile_rows
        codes, scales = [], []
        for start in range(0, size, step):
            rows = min(step, size - start)
            values = normal(rows, columns, std=columns**-0.5)
            quantised = kind.quantise(values)
            codes.append(layout.pack(quantised.codes))
            scales.append(quantised.scales)
        found[f"{name}.codes"] = torch.cat(codes)
        if f"{name}.scales" in table:
            groups = torch.cat([part for part in scales if part is not None])
            found[f"{name}.scales"] = groups.t().contiguous()
    for name, size in compiled.fused.vectors.items():
        found[name] = normal(size, std=0.1) + float(name.endswith("norm.weight"))
    for name, constant in compiled.constants.items():
        found[name] = constant.to(DEVICE)
    return packed_layer.assembled(form, found)


def graphed(launch: Callable[[], object], repeats: int = 25) -> float:
    """Median time of some launches as a graph."""
    graph = CudaGraph(lambda: (launch(), None)[1], DEVICE)
    found = graph.seconds(repeats)
    graph.close()
    return found


def take_turns(*graphs: Callable[[], object]) -> list[float]:
    """Median time of one launch of each, one after the other and over again; each synchronises."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(TURNS):
        for launch, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            launch()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
    return [statistics.median(found[TURNS // 4 :]) for found in times]


@triton.jit
def _copy(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at))


def copy_rate() -> float:
    """Bytes that are read and written a second by the faster of two ways to copy 1 GiB."""
    size = 1 << 28
    source, target = (torch.randint(2**31, (size,), dtype=torch.int32, device=DEVICE) for _ in "ab")
    times = [
        graphed(lambda: target.copy_(source)),
        graphed(lambda: _copy[(size // 4096,)](source, target, SIZE=4096, num_warps=8)),
    ]
    return 2 * 4 * size / min(times)


def rates() -> Rates:
    """Measured: copying, and the library's products of 8192³."""
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
    return Rates(copy_rate(), found)


def operations(model: str, shape: Workload) -> float:
    """Multiplications and additions of the products, and of attention over what is seen."""
    matrices = layers.ensure(models.layer_config(model), default_dir()).fused.matrices
    weights = sum(rows * columns for rows, columns in matrices.values())
    width, _ = matrices["query"]
    pairs = shape.batch_size * shape.seq_len * (shape.seq_len + 1) / 2
    return 2.0 * weights * shape.tokens + 4.0 * width * pairs


def timed(model: str, layer: PackedLayer, activation: str, shape: Workload) -> Timed:
    """Gate and time one case. Raises AssertionError where the gate does not hold."""
    kind: Format | None = None if activation == "fp16" else formats.get(activation)
    program = layer.form.program(shape, kind)
    planned = plan(program)
    size = arena_bytes(program, planned, cuda)
    arena = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    states = (
        torch.from_numpy(hidden_states(models.layer_config(model), shape, 0))
        .view(shape.tokens, -1)
        .to(DEVICE)
    )

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
    assert torch.equal(found, again), "two runs differ"
    assert error <= GATE[activation], f"error {error:.1e}"
    float32_error = None
    if kind is None:
        float32_error = from_float32(model, layer, shape, found)
        assert float32_error <= GATE[activation], f"error {float32_error:.1e} of float32"
    execution = Execution(program, planned, layer, cuda, arena)
    graph = CudaGraph(execution.run, DEVICE)
    alone = Execution(
        program, planned, layer, cuda, arena, only=lambda step: step.kernel in PRODUCTS
    )
    times = graph.seconds(), graphed(alone.run)
    nbytes = sum(matrix.nbytes for matrix in layer.matrices.values())
    return Timed(
        *times, error, float32_error, nbytes, operations(model, shape), layer, graph, execution
    )


def from_float32(model: str, layer: PackedLayer, shape: Workload, found: Tensor) -> float:
    """The error of an output [tokens, hidden_size], held against PyTorch's layer in float32."""
    config = models.layer_config(model)
    sources = layers.ensure(config, default_dir()).sources
    expected = reference.output(config, layer, sources, shape, 0, None)
    torch.cuda.empty_cache()
    return layer_reference.error(found.float().cpu().numpy().reshape(expected.shape), expected)


def inductor(model: str, layer: PackedLayer, shape: Workload) -> Callable[[], object]:
    """A pass of PyTorch-Inductor's layer with the same weights in float16, compiled as `memladder`
    does to measure its memory."""
    config = models.layer_config(model)
    sources = layers.ensure(config, default_dir()).sources
    module = reference.dequantised(config, layer, sources, shape).half()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    states = torch.from_numpy(hidden_states(config, shape, 0)).to(DEVICE)

    def run() -> object:
        with torch.inference_mode():
            return compiled(states)

    run()
    return run


def marlin(model: str, shape: Workload) -> float:
    """Seconds of vLLM's Marlin on the layer's matrices, q, k, v and gate, up as one each."""
    import peers

    matrices = layers.ensure(models.layer_config(model), default_dir()).fused.matrices
    rows = {name: size for name, (size, _) in matrices.items()}
    sizes = [
        (rows["query"] + rows["key"] + rows["value"], matrices["query"][1]),
        (rows["output"], matrices["output"][1]),
        (rows["up"] + rows.get("gate", 0), matrices["up"][1]),
        (rows["down"], matrices["down"][1]),
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
    parser.add_argument("--peers", default="llama", help="models that others run as well")
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
        "| layer / higher floor | products, µs | products / bytes' floor | error | of float32 |",
        "|---|---|---|---|" + "---:|" * 8,
    ]
    print(*lines, sep="\n", flush=True)
    holds = True
    goals = ["", "| what | against | goal | measured | holds |", "|---|---|---:|---:|---|"]
    wanted = [pair for pair in ROWS if pair[0] in options.formats.split(",")]
    for model in options.models.split(","):
        found: dict[tuple[str, Workload], Timed] = {}
        for weight, activation in wanted:
            layer = packed(model, formats.get(weight))
            for shape in SHAPES:
                try:
                    one = timed(model, layer, activation, shape)
                except AssertionError as error:
                    holds = False
                    cells = (model, shape, weight, activation, f"gate: {error}", *[""] * 7)
                    lines.append(f"| {' | '.join(map(str, cells))} |")
                else:
                    found[weight, shape] = one
                    lines.append(row(model, weight, activation, shape, one, best))
                print(lines[-1], flush=True)
        goals += compared(model, found, best, model in options.peers.split(","))
        if options.output is not None:
            options.output.write_text("\n".join([*lines, *goals]) + "\n")
        del layer
        found.clear()
        torch.cuda.empty_cache()
    print(*goals, sep="\n")
    return 0 if holds else 1


def row(model: str, weight: str, activation: str, shape: Workload, one: Timed, best: Rates) -> str:
    """A line of the table."""
    read = one.weight_bytes / best.copy
    compute = one.operations / best.products[activation]
    return (
        f"| {model} | {shape} | {weight} | {activation} | {1e6 * one.layer_s:.1f} "
        f"| {1e6 * read:.1f} | {1e6 * compute:.1f} | {one.layer_s / max(read, compute):.2f} "
        f"| {1e6 * one.products_s:.1f} | {one.products_s / read:.2f} | {one.error:.1e} "
        f"| {'' if one.float32_error is None else f'{one.float32_error:.1e}'} |"
    )


def compared(
    model: str, found: dict[tuple[str, Workload], Timed], best: Rates, peers: bool
) -> list[str]:
    """The goals, each with what was measured."""
    one, few, many = SHAPES
    lines: list[str] = []

    def goal(what: str, against: str, bound: float, ratio: float, most: bool = False) -> None:
        good = ratio <= bound if most else ratio >= bound
        sign = "≤" if most else "≥"
        holds = "yes" if good else "no"
        lines.append(f"| {model} {what} | {against} | {sign} {bound:.2f} | {ratio:.2f} | {holds} |")

    for weight, _ in ROWS:
        if (single := found.get((weight, one))) is not None:
            read = single.weight_bytes / best.copy
            least, most = (0.6, 2.0) if weight == "int1" else (0.9, 1.25)
            goal(f"{weight}: matrices at batch 1", "copy", least, read / single.products_s)
            goal(f"{weight}: layer 1x1", "read time", most, single.layer_s / read, most=True)
    base = found.get(("fp16", many))
    if base is not None:
        for weight, least in (("int4", 0.9), ("nf4", 0.9), ("fp8", 1.5), ("mxfp8", 1.0),
                              ("int1", 1.5)):  # fmt: skip
            if (other := found.get((weight, many))) is not None:
                alone = base.layer_s, other.layer_s
                turns = take_turns(base.graph.run, other.graph.run)
                for how, (fp16, own) in (("alone", alone), ("in turns", turns)):
                    goal(f"{weight}: layer 1x4096 {how}, {1e3 * own:.2f} ms",
                         f"ladder fp16, {1e3 * fp16:.2f} ms", least, fp16 / own)  # fmt: skip
    if not peers:
        return lines
    # Welder's program is Ladder's in fp16.
    for shape, least in ((one, 0.91), (many, 1.0)):
        if (own_case := found.get(("fp16", shape))) is None:
            continue
        call = inductor(model, own_case.layer, shape)
        graph = CudaGraph(lambda call=call: (call(), None)[1], DEVICE)  # type: ignore[misc]
        turns = take_turns(graph.run, own_case.graph.run)
        called = take_turns(call, own_case.graph.run)
        alone = graph.seconds(), own_case.layer_s
        for how, (other_s, own) in (("as a CUDA graph, alone", alone),
                                    ("as a CUDA graph, in turns", turns),
                                    ("called, in turns", called)):  # fmt: skip
            goal(f"fp16: layer {shape}, {1e3 * own:.3f} ms",
                 f"PyTorch-Inductor {how}, {1e3 * other_s:.3f} ms", least,
                 other_s / own)  # fmt: skip
        graph.close()
        del graph, call
        torch.cuda.empty_cache()
    for shape in (few, one):
        if (int4 := found.get(("int4", shape))) is not None:
            try:
                other_s = marlin(model, shape)
            except UnavailableError as error:  # a peer that is not here is told, and misses nothing
                lines.append(f"| {model} int4: layer {shape} | Marlin: {error} | | | |")
                continue
            goal(f"int4: layer {shape}, {1e6 * int4.layer_s:.1f} µs",
                 f"Marlin's matrices alone, {1e6 * other_s:.1f} µs", 1.0,
                 other_s / int4.layer_s)  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
