"""A compiled layer as a folder: its program, its packed weights, and the schedule for people.

program.json         steps over named buffers, and the arena's offsets
weights.safetensors  matrices in their formats, vectors, constants
schedule.md          what is fused, tiles, traffic; arena.svg: where buffers lie, step by step
kernels/             the Triton kernels that a GPU would run, to read
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.core.errors import FormatError
from memladder.engine.compile.compile import Result
from memladder.engine.graph.nodes import Weight
from memladder.engine.packed import packed_layer, packing
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.packed.packing import Blocks, Progress
from memladder.engine.program.plan import ArenaPlan, plan
from memladder.engine.program.steps import Buffer, Program, Rows, Step

PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
_VERSION = 2

KERNELS = frozenset(
    (
        *("matmul", "glu", "qkv", "rotary", "attention", "quantise", "pointwise"),
        *("rms_norm", "layer_norm", "rms_norm_heads", "layer_norm_heads", "windowed_attention"),
    )
)
"""What a program may call: a file can't name anything else."""


@dataclass(frozen=True)
class Compiled:
    """A layer ready to run at one shape."""

    shape: Workload
    program: Program
    plan: ArenaPlan
    weights: PackedLayer


def pack(found: Result, path: Path, progress: Progress | None = None) -> None:
    """Write the weights, block by block. Raises FormatError as `packing.pack` does."""
    own = found.parameters
    blocks = {name: Blocks(w.array.name, _reader(w)) for name, w in own.matrices.items()}
    blocks |= {name: Blocks(name, _part(v)) for name, v in own.vectors.items()}
    constants = {name: torch.from_numpy(v) for name, v in own.constants.items()}
    packing.write(path, found.form.contents, blocks, constants, progress=progress)


def _reader(weight: Weight) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        found = torch.from_numpy(weight.block(start, stop))
        if not found.isfinite().all():
            raise FormatError(
                f"{weight.array.name} holds NaN or infinity in rows {start} to {stop - 1}"
            )
        return found

    return read


def _part(vector: np.ndarray) -> Callable[[int, int], Tensor]:
    return lambda start, stop: torch.from_numpy(np.array(vector[start:stop]))


def program_json(found: Result) -> str:
    """Everything but the weights, as text that a person can read."""
    shape, program, planned = found.graph.shape, found.program, found.plan
    raw = {
        "memladder_program": _VERSION,
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "input": program.input,
        "output": program.output,
        "arena_bytes": planned.nbytes,
        "lower_bound": planned.lower_bound,
        "buffers": [
            asdict(buffer) | {"offset": planned.offsets.get(buffer.name)}
            for buffer in program.buffers
        ],
        "steps": [asdict(step) for step in program.steps],
    }
    return json.dumps(raw, indent=1) + "\n"


def load(program: Path, weights: Path) -> Compiled:
    """A compiled layer of its two files. Raises FormatError for files that are none."""
    try:
        raw = json.loads(program.read_bytes())
        shape, steps = _program(raw)
    except OSError as error:
        raise FormatError(f"{program}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise FormatError(f"{program}: not a program of memladder") from None
    held = packed_layer.load(weights)
    known = held.matrices.keys() | held.vectors.keys()
    lacking = {name for step in steps.steps for name in step.weights.values()} - known
    if lacking:
        raise FormatError(f"{weights}: {min(lacking)!r} is missing, which {program} reads")
    return Compiled(shape, steps, plan(steps), held)


def _program(raw: Mapping[str, Any]) -> tuple[Workload, Program]:
    if raw["memladder_program"] != _VERSION:
        raise ValueError("another version")
    buffers = tuple(Buffer(b["name"], b["rows"], b["columns"], b["dtype"]) for b in raw["buffers"])
    program = Program(buffers, tuple(map(_step, raw["steps"])), raw["input"], raw["output"])
    if any(step.kernel not in KERNELS for step in program.steps):
        raise ValueError("an unknown kernel")
    return Workload(raw["batch_size"], raw["seq_len"]), program


def _step(raw: Mapping[str, Any]) -> Step:
    reads, writes = (
        {
            name: Rows(rows["buffer"], rows["start"], rows["count"])
            for name, rows in raw[key].items()
        }
        for key in ("reads", "writes")
    )
    in_place = tuple((read, written) for read, written in raw["in_place"])
    return Step(raw["kernel"], reads, writes, raw["weights"], raw["values"], in_place)
