"""The layers that one device runs: their weights, their cache, one arena for all programs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import Form, Weights
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.model import EMBEDDING, Around, join
from memladder.engine.program.plan import ArenaPlan, plan
from memladder.engine.program.steps import Program
from memladder.engine.run.execute import Execution, shared_arena_bytes
from memladder.engine.run.positions import Positions
from memladder.formats._shared.base import Format


@dataclass(frozen=True)
class StagePlan:
    """What a stage runs, and what it takes: known before anything of it is on a device.

    layers: number, form and cache of each. `chunk`: tokens of a run at the most.
    """

    layers: Sequence[tuple[int, Form, CacheShape]]
    around: Around
    activation: Format | None
    slots: int
    chunk: int

    def shapes(self) -> Iterator[Workload]:
        """The shapes of all runs: one new token of every sequence; and of one sequence, or of as
        many as fill the chunk, a power of two of tokens."""
        found = {Workload(self.slots, 1)}
        for seq_len in lengths(self.chunk):
            for count in {1, max(1, min(self.slots, self.chunk // seq_len))}:
                found.add(Workload(count, seq_len))
        yield from sorted(found, key=lambda shape: (shape.seq_len, shape.batch_size))

    def program(self, shape: Workload) -> Program:
        """All steps of a run at one of the shapes."""
        lowered: dict[tuple[str, ...], Program] = {}

        def one(form: Form, cache: CacheShape) -> Program:
            # Alike layers have one program, whose names `join` changes.
            key = (*packed_layer.metadata(form).values(), str(cache))
            if key not in lowered:
                lowered[key] = form.program(shape, self.activation, cache=cache)
            return lowered[key]

        layers = [(number, one(form, cache)) for number, form, cache in self.layers]
        return join(layers, self.around, shape)

    @cached_property
    def programs(self) -> dict[Workload, tuple[Program, ArenaPlan]]:
        """All programs with their plans."""
        found = {}
        for shape in self.shapes():
            program = self.program(shape)
            found[shape] = program, plan(program)
        return found

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all layers."""
        return next(iter(self.programs.values()))[1].state_bytes

    def arena_bytes(self, device: torch.device) -> int:
        """Of the program that takes the most."""
        return shared_arena_bytes(self.programs.values(), kernels(device))


def lengths(chunk: int) -> list[int]:
    """New tokens a sequence that there are programs for: fewer are padded, more are several runs.

    Up to some 64 rows a GPU reads weights all the time; beyond, powers of two.

    >>> lengths(12), lengths(512)
    ([12], [16, 64, 128, 256, 512])
    """
    return [n for n in (16, *(1 << i for i in range(6, chunk.bit_length()))) if n < chunk] + [chunk]


def kernels(device: torch.device) -> ModuleType:
    """The module of kernels for a device."""
    name = "naive" if device.type == "cpu" else "cuda"
    return importlib.import_module(f"memladder.kernels.{name}")


class Stage:
    """A plan's layers on a device.

    Memory: `weights`, one block on a GPU and mapped files on the CPU; cache and arena, which are
    taken here, and may hold anything at first.
    """

    def __init__(
        self,
        planned: StagePlan,
        device: torch.device,
        weights: Weights,
        allocate: Callable[[int], Tensor],
    ) -> None:
        self.planned, self.device, self.weights = planned, device, weights
        self._kernels = kernels(device)
        self._arena = allocate(planned.arena_bytes(device))
        self._cache = allocate(planned.cache_bytes)
        cache = planned.layers[0][2]
        self._positions = {shape: Positions(cache, shape, device) for shape in planned.programs}
        self._chosen = torch.zeros(planned.slots, 1, dtype=torch.int32, device=device)
        self._executions: dict[Workload, Execution] = {}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by category."""
        return {
            "weights": self.weights.nbytes,
            "cache": self._cache.numel(),
            "arena": self._arena.numel(),
        }

    def step_weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but embeddings that are not the head too."""
        ends = self.planned.around
        if not ends.first or (ends.last and ends.ends.is_tied):
            return self.weights.nbytes
        return self.weights.nbytes - self.weights.matrices[EMBEDDING].nbytes

    def positions(self, shape: Workload) -> Positions:
        """Where the sequences of a run at that shape are."""
        return self._positions[shape]

    def execution(self, shape: Workload) -> Execution:
        """A run at one of the plan's shapes. What it leaves in the arena another's overwrites."""
        if shape not in self._executions:
            self._executions[shape] = Execution(
                *self.planned.programs[shape],
                self.weights,
                self._kernels,
                self._arena,
                state=self._cache,
                scalars=self._positions[shape].scalars,
            )
        return self._executions[shape]

    def chosen(self, shape: Workload) -> Tensor:
        """int32 [sequences, 1]: the ids of the largest logits after `choose`. On a device that has
        the whole model they are where its next step reads them."""
        if self.planned.around.first and shape.seq_len == 1:
            return self.execution(shape).input
        return self._chosen[: shape.batch_size]

    def choose(self, shape: Workload) -> None:
        """Choose the next token of each sequence by the last run's logits."""
        self._kernels.choose_largest(self.execution(shape).output, self.chosen(shape))

    def step(self, shape: Workload) -> None:
        """A run of one token a sequence; then positions are one further, and the next tokens are
        chosen: what a CUDA graph launches again and again."""
        self.execution(shape).run()
        self._kernels.advance(self._positions[shape].tensor)
        if self.planned.around.last:
            self.choose(shape)
