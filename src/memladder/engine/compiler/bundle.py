"""A compiled layer as a folder: its program, its packed weights, and the schedule for people.

program.json         steps over named buffers, and the arena's offsets
weights.safetensors  matrices in their formats, vectors, constants
schedule.md          what is fused, tiles, traffic; arena.svg: where buffers lie, step by step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memladder import formats
from memladder.case import Shape
from memladder.engine import packed_layer, packing
from memladder.engine.compiler.fused import Fused
from memladder.engine.graph.nodes import Weight
from memladder.engine.packed_layer import Weights
from memladder.engine.packing import Blocks, MatrixReport, Progress
from memladder.engine.plan import Plan, plan
from memladder.engine.program import Buffer, Program, Rows, Step
from memladder.errors import FormatError
from memladder.formats.base import Format

PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
_VERSION = 1

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

    shape: Shape
    program: Program
    plan: Plan
    weights: Weights


def choose_formats(fused: Fused, kind: Format, kept: tuple[str, ...]) -> dict[str, Format]:
    """A format for each matrix: `kind`, or fp16 where a pattern of `kept` fits its name.

    A name is the engine's (`query`, `down`) or the model's (`self_attn.q_proj.weight`).
    """
    fp16 = formats.get("fp16")
    return {
        name: fp16
        if any(
            fnmatchcase(known, pattern) for pattern in kept for known in (name, weight.array.name)
        )
        else kind
        for name, weight in fused.matrices.items()
    }


def pack(
    fused: Fused,
    kinds: Mapping[str, Format],
    default: Format,
    path: Path,
    *,
    judge: bool = False,
    progress: Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """Write the weights, block by block. Raises FormatError as `packing.pack` does."""
    return packing.write(
        path,
        described(fused, kinds, default),
        {
            name: Blocks(kinds[name], len(w.rows), w.columns, w.array.name, _reader(w))
            for name, w in fused.matrices.items()
        },
        {name: Blocks(None, len(v), 1, name, _part(v)) for name, v in fused.vectors.items()},
        {},
        judge=judge,
        progress=progress,
    )


def described(fused: Fused, kinds: Mapping[str, Format], default: Format) -> dict[str, str]:
    """What the weights' file says about itself: what it must hold follows."""
    return {
        "memladder_compiled": str(_VERSION),
        "default": str(default),
        "formats": json.dumps({name: str(kind) for name, kind in kinds.items()}),
        "shapes": json.dumps({n: [len(w.rows), w.columns] for n, w in fused.matrices.items()}),
        "vectors": json.dumps({name: len(vector) for name, vector in fused.vectors.items()}),
    }


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


def load_weights(path: Path) -> Weights:
    """The weights of `pack`, memory-mapped. Raises FormatError for any other file."""
    with packed_layer.opened(path) as file:
        said = file.metadata() or {}
        try:
            if said["memladder_compiled"] != str(_VERSION):
                raise ValueError("another version")
            kinds = {n: formats.get(k) for n, k in json.loads(said["formats"]).items()}
            shapes, vectors = json.loads(said["shapes"]), json.loads(said["vectors"])
            default = formats.get(said["default"])
            table = packed_layer.tensor_table(
                {name: (kinds[name], *shape) for name, shape in shapes.items()}, vectors, {}
            )
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise FormatError(f"{path}: not the weights of a compiled layer") from None
        found = packed_layer.checked(path, file, table)
    matrices = {
        name: packed_layer.packed_matrix(kinds[name], rows, columns, name, found)
        for name, (rows, columns) in shapes.items()
    }
    return Weights(default, matrices, {name: found[name] for name in vectors})


def program_json(fused: Fused, program: Program, planned: Plan) -> str:
    """Everything but the weights, as text that a person can read."""
    shape = fused.shape
    found = {
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
        "constants": {name: vector.tolist() for name, vector in fused.constants.items()},
        "steps": [asdict(step) for step in program.steps],
    }
    return json.dumps(found, indent=1) + "\n"


def load(program: Path, weights: Path) -> Compiled:
    """A compiled layer of its two files. Raises FormatError for files that are none."""
    try:
        raw = json.loads(program.read_bytes())
        shape, steps = _program(raw)
        constants = {
            name: torch.tensor(vector, dtype=torch.float32)
            for name, vector in raw["constants"].items()
        }
    except OSError as error:
        raise FormatError(f"{program}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise FormatError(f"{program}: not a program of memladder") from None
    held = load_weights(weights)
    held = replace(held, vectors={**held.vectors, **constants})
    known = held.matrices.keys() | held.vectors.keys()
    lacking = {name for step in steps.steps for name in step.weights.values()} - known
    if lacking:
        raise FormatError(f"{weights}: {min(lacking)!r} is missing, which {program} reads")
    return Compiled(shape, steps, plan(steps), held)


def _program(raw: Mapping[str, Any]) -> tuple[Shape, Program]:
    if raw["memladder_program"] != _VERSION:
        raise ValueError("another version")
    buffers = tuple(Buffer(b["name"], b["rows"], b["columns"], b["dtype"]) for b in raw["buffers"])
    program = Program(buffers, tuple(map(_step, raw["steps"])), raw["input"], raw["output"])
    if any(step.kernel not in KERNELS for step in program.steps):
        raise ValueError("an unknown kernel")
    return Shape(raw["batch_size"], raw["seq_len"]), program


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
