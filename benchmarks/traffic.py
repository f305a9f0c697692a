"""How many bytes kernels move from and to memory: counted by Nsight Compute, and as predicted.

    python benchmarks/traffic.py [--output FILE.md] [--models llama,bloom] [--formats fp16,int4]

Every kind of step of a layer's program runs once under `ncu`, the caches empty before it, and is
held against what `schedule.md` says. What is still in the cache when a kernel ends is not counted:
up to 50 MB of what it wrote. Exit status 1 where `ncu` counted other launches than were made.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import layers as benchmark
from memladder import formats
from memladder.core.case import Workload
from memladder.core.units import mib
from memladder.engine.compile.traffic import Traffic
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import Step
from memladder.engine.run.driver import CudaGraph
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.kernels import cuda

SHAPES = ("1x1", "1x4096")
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
NCU = [
    "ncu", "--csv", "--page", "raw", "--print-units", "base", "--metrics", f"{READ},{WRITTEN}",
    "--profile-from-start", "off", "--clock-control", "none",
]  # fmt: skip


@dataclass(frozen=True)
class Predicted:
    """A step: what it is, bytes that it should move, and how many kernels it launches."""

    kernel: str
    matrices: str
    rows: int
    nbytes: int
    launches: int


def profiled(model: str, weight: str, shape: Workload) -> list[Predicted]:
    """Run one step of each kind, the last one, where `ncu` counts."""
    layer = benchmark.packed(model, formats.get(weight))
    activation = formats.ACTIVATIONS.get(weight, "fp16")
    program = layer.form.program(shape, None if activation == "fp16" else formats.get(activation))
    planned = plan(program)
    arena = torch.zeros(
        arena_bytes(program, planned, cuda), dtype=torch.uint8, device=benchmark.DEVICE
    )
    traffic = Traffic(layer.form, program)
    kinds: dict[tuple[str, str, int], Step] = {}
    for step in program.steps:
        matrices = ", ".join(name for name in step.weights.values() if name in layer.matrices)
        kinds[step.kernel, matrices, next(iter(step.writes.values())).count] = step
    found, runs = [], []
    for (kernel, matrices, rows), step in kinds.items():
        execution = Execution(
            program, planned, layer, cuda, arena, only=lambda other, step=step: other is step
        )
        graph = CudaGraph(execution.run, benchmark.DEVICE)
        nbytes = traffic.of(step)
        found.append(Predicted(kernel, matrices, rows, nbytes, graph.launches))
        graph.close()
        runs.append(execution.run)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return found


def counted(model: str, weight: str, shape: str) -> list[tuple[Predicted, float, float]]:
    """Steps, with the bytes that each read from memory and wrote there."""
    with tempfile.TemporaryDirectory() as folder:
        log, told = Path(folder) / "ncu.csv", Path(folder) / "steps.json"
        once = [sys.executable, __file__, "--once", model, weight, shape, str(told)]
        subprocess.run([*NCU, "--log-file", str(log), *once], check=True)
        steps = [Predicted(**step) for step in json.loads(told.read_text())]
        rows = kernels(log.read_text())
    expected = sum(step.launches for step in steps)
    if len(rows) != expected:
        raise ValueError(f"ncu counted {len(rows)} kernels where {expected} were launched")
    found = []
    for step in steps:
        own, rows = rows[: step.launches], rows[step.launches :]
        found.append((step, *(sum(values) for values in zip(*own, strict=True))))
    return found


def kernels(log: str) -> list[tuple[float, float]]:
    """Bytes read and written by each kernel of `ncu --csv --page raw`, in order."""
    table = log[log.index('"ID"') :]
    return [
        (float(row[READ].replace(",", "")), float(row[WRITTEN].replace(",", "")))
        for row in csv.DictReader(io.StringIO(table))
        if row["ID"]  # the first line has units
    ]


def main(arguments: list[str]) -> int:
    """Count, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,bloom")
    parser.add_argument("--formats", default="fp16,int4")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--once", nargs=4, metavar=("MODEL", "FORMAT", "SHAPE", "FILE"),
                        help="run the steps of one layer, for ncu")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.once is not None:
        model, weight, shape, file = options.once
        steps = profiled(model, weight, Workload.parse(shape))
        Path(file).write_text(json.dumps([asdict(step) for step in steps]))
        return 0
    lines = [
        "| layer | shape | weights | kernel | matrices | rows | predicted, MiB | read, MiB "
        "| written, MiB | counted / predicted |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    print(*lines, sep="\n", flush=True)
    status = 0
    for model in options.models.split(","):
        for weight in options.formats.split(","):
            for shape in SHAPES:
                try:
                    found = counted(model, weight, shape)
                except ValueError as error:
                    status = 1
                    lines.append(f"| {model} | {shape} | {weight} | {error} |" + " |" * 6)
                else:
                    lines += [
                        f"| {model} | {shape} | {weight} | {step.kernel} | {step.matrices} "
                        f"| {step.rows} | {mib(step.nbytes):,.1f} | {mib(read):,.1f} "
                        f"| {mib(written):,.1f} | {(read + written) / step.nbytes:.2f} |"
                        for step, read, written in found
                    ]
                    print(*lines[-len(found) :], sep="\n", flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
