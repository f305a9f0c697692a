"""Running a planned program: every operand is a view that was made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.plan import ArenaPlan
from memladder.engine.program.steps import Program, Rows, Step


def arena_bytes(program: Program, plan: ArenaPlan, kernels: ModuleType) -> int:
    """The plan's bytes, and behind them those that the kernels want for themselves."""
    rows = {part.count for step in program.steps for part in step.reads.values()}
    return plan.nbytes + max(map(kernels.workspace_bytes, rows), default=0)


class Execution:
    """A program bound to an arena, to a packed layer and to kernels; `run` allocates nothing.

    `arena` is uint8 and `arena_bytes` long. `only` takes some of the steps: what is timed
    or compared alone.
    """

    def __init__(
        self,
        program: Program,
        plan: ArenaPlan,
        layer: PackedLayer,
        kernels: ModuleType,
        arena: Tensor,
        only: Callable[[Step], bool] = lambda _: True,
    ) -> None:
        assert arena.dtype == torch.uint8
        assert arena.numel() >= arena_bytes(program, plan, kernels)
        self._kernels = kernels
        self._workspace = arena[plan.nbytes :]
        # Zero at first, without a kernel; kernels leave it so.
        self._workspace.copy_(torch.zeros(len(self._workspace), dtype=torch.uint8))
        self._arena = arena
        self._offsets = plan.offsets
        self._buffers = {buffer.name: buffer for buffer in program.buffers}
        self._calls: list[Callable[[], None]] = []
        for step in filter(only, program.steps):
            operands = {name: self._view(rows) for name, rows in step.reads.items()}
            operands |= {name: self._view(rows) for name, rows in step.writes.items()}
            packed = {
                name: layer.matrices[key] if key in layer.matrices else layer.vectors[key]
                for name, key in step.weights.items()
            }
            kernel = getattr(kernels, step.kernel)
            self._calls.append(partial(kernel, **operands, **packed, **step.values))
        self.input = self._whole(program.input)
        """Where the hidden states are written before a run: float16 [tokens, hidden_size]."""
        self.output = self._whole(program.output)
        """Where they are afterwards."""

    def run(self) -> None:
        """One pass over what `input` holds."""
        self._kernels.use_workspace(self._workspace)
        for call in self._calls:
            call()

    def _whole(self, name: str) -> Tensor:
        return self._view(Rows(name, 0, self._buffers[name].rows))

    def _view(self, rows: Rows) -> Tensor:
        buffer = self._buffers[rows.buffer]
        row_bytes = buffer.nbytes // buffer.rows
        start = self._offsets[rows.buffer] + rows.start * row_bytes
        part = self._arena[start : start + rows.count * row_bytes]
        return part.view(getattr(torch, buffer.dtype)).view(rows.count, buffer.columns)
