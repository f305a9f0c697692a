"""A packed layer run over sequences whose past is in its key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import CHUNK
from memladder.engine.run.execute import Execution, shared_arena_bytes
from memladder.engine.run.positions import Positions
from memladder.formats._shared.base import Format


class CachedRunner:
    """One layer, its cache, and its programs: made for every shape of `workloads`, in one arena.

    Arena and cache hold NaN at first, so that nothing is read before it was written.
    """

    def __init__(
        self,
        layer: PackedLayer,
        cache: CacheShape,
        kernels: ModuleType,
        workloads: Sequence[Workload],
        activation: Format | None = None,
        device: str = "cpu",
        chunk: int = CHUNK,
    ) -> None:
        form = layer.form
        programs = [form.program(w, activation, cache=cache, chunk=chunk) for w in workloads]
        block = torch.empty(packed_layer.device_bytes(layer), dtype=torch.uint8, device=device)
        layer = packed_layer.on_device(layer, block)
        planned = [(program, plan(program)) for program in programs]
        assert len({tuple(p.state.items()) for _, p in planned}) == 1
        size = shared_arena_bytes(planned, kernels)
        arena = torch.full((size,), 255, dtype=torch.uint8, device=device)
        self.state = torch.full((planned[0][1].state_bytes,), 255, dtype=torch.uint8, device=device)
        self.past = [0] * cache.slots
        self.bound: dict[Workload, tuple[Execution, Positions]] = {}
        """A program's execution and its sequences' positions, by its shape."""
        for workload, (program, arranged) in zip(workloads, planned, strict=True):
            positions = Positions(cache, workload, torch.device(device))
            execution = Execution(
                program, arranged, layer, kernels, arena,
                state=self.state, scalars=positions.scalars,
            )  # fmt: skip
            self.bound[workload] = execution, positions

    def run(
        self, workload: Workload, given: Sequence[Tensor], slots: Sequence[int]
    ) -> list[Tensor]:
        """New hidden states [tokens, hidden_size] of each sequence through the program of a shape;
        what comes out for them. The rows of padding hold NaN."""
        execution, positions = self.bound[workload]
        new = [len(part) for part in given]
        positions.set(slots, [self.past[slot] for slot in slots], new)
        rows = execution.input.view(workload.batch_size, workload.seq_len, -1)
        rows.fill_(torch.nan)
        for own, part in zip(rows, given, strict=True):
            own[: len(part)] = part
        execution.run()
        for slot, count in zip(slots, new, strict=True):
            self.past[slot] += count
        found = execution.output.view(rows.shape)
        return [own[: len(part)].cpu().clone() for own, part in zip(found, given, strict=True)]

    def in_turn(self, workload: Workload, states: Tensor, slot: int = 0) -> Tensor:
        """One sequence's hidden states, as many tokens at a time as the program has rows."""
        parts = states.split(workload.seq_len)
        return torch.cat([self.run(workload, [part], [slot])[0] for part in parts])
