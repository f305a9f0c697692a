"""A compiled layer as a folder: its program, its packed weights, and the schedule for people.

program.json         steps over named buffers, and the arena's offsets
weights.safetensors  matrices in their formats, vectors, constants
schedule.md          what is fused, tiles, traffic; arena.svg: where buffers lie, step by step
kernels/             the Triton kernels that a GPU would run, to read
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memladder import formats
from memladder.core import digests
from memladder.core.case import Workload
from memladder.core.errors import FormatError, MemladderError
from memladder.core.files import read_regular
from memladder.core.serial import from_json, to_json
from memladder.engine.compile.compile import Result
from memladder.engine.graph.nodes import Weight
from memladder.engine.packed import packed_layer, packing
from memladder.engine.packed.packed_layer import Form, PackedLayer
from memladder.engine.packed.packing import Blocks, Progress
from memladder.engine.program.plan import ArenaPlan, plan
from memladder.engine.program.steps import Program

PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
_VERSION = 3
# Of a program with a million steps.
_MOST_BYTES = 1 << 30


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


@dataclass(frozen=True)
class Head:
    """What a program is made of, besides the fused layer: see `Form.program`."""

    memladder_program: int
    batch_size: int
    seq_len: int
    activation: str | None
    chunk: int
    budget: int
    in_place: bool

    def program(self, form: Form) -> Program:
        """The layer's program. Raises MemladderError for any other text."""
        return form.program(
            Workload(self.batch_size, self.seq_len),
            None if self.activation is None else formats.get(self.activation),
            chunk=self.chunk,
            budget=self.budget,
            in_place=self.in_place,
        )


def program_json(found: Result) -> str:
    """Everything but the weights, as text that a person can read."""
    shape = found.graph.shape
    head = Head(
        _VERSION,
        shape.batch_size,
        shape.seq_len,
        None if found.activation is None else str(found.activation),
        found.chunk,
        found.options.budget or 0,
        found.options.in_place,
    )
    return _text(head, found.program, found.plan)


def _text(head: Head, program: Program, planned: ArenaPlan) -> str:
    raw = {
        **to_json(head),
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
    """A compiled layer of its two files.

    Nothing of program.json is run: its program is made again, of the packed layer, and the file
    must be what would be written of it. Raises FormatError for files that are none.
    """
    text = read_regular(program, _MOST_BYTES, FormatError)
    try:
        raw = json.loads(text)
        head = from_json(Head, {field.name: raw[field.name] for field in fields(Head)})
    except (ValueError, LookupError, TypeError, RecursionError):
        raise FormatError(f"{program}: not a program of memladder") from None
    if head.memladder_program != _VERSION:
        raise FormatError(
            f"{program}: version {head.memladder_program}, not {_VERSION}; compile the layer again"
        )
    digests.require(weights)
    held = packed_layer.load(weights)
    foreign = FormatError(f"{program}: not the program of {weights}; compile the layer again")
    # Each chunk of tokens has steps of its own in the text.
    least = max(head.batch_size, 1) * max(head.seq_len, 1) // max(head.chunk, 1)
    if head.chunk < 1 or head.budget < 0 or least > len(text):
        raise foreign
    try:
        steps = head.program(held.form)
        planned = plan(steps)
    except (MemladderError, ValueError):
        raise foreign from None
    if _text(head, steps, planned).encode() != text:
        raise foreign
    return Compiled(Workload(head.batch_size, head.seq_len), steps, planned, held)
