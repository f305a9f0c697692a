"""Running a planned program: every operand is a view that was made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from memladder.engine.packed.packed_layer import Weights
from memladder.engine.program.plan import ArenaPlan
from memladder.engine.program.steps import Program, Rows, Step


def arena_bytes(program: Program, plan: ArenaPlan, kernels: ModuleType) -> int:
    """The plan's bytes, and behind them those that the kernels want for themselves."""
    return shared_arena_bytes([(program, plan)], kernels)


def shared_arena_bytes(programs: Iterable[tuple[Program, ArenaPlan]], kernels: ModuleType) -> int:
    """An arena that serves several programs, one run at a time: the most bytes that a plan has, and
    behind them the most that the kernels want for themselves."""
    both = list(programs)
    workspace = max(_workspace_bytes(program, kernels) for program, _ in both)
    return max(plan.nbytes for _, plan in both) + workspace


def _workspace_bytes(program: Program, kernels: ModuleType) -> int:
    rows = {part.count for step in program.steps for part in step.reads.values()}
    return max(map(kernels.workspace_bytes, rows), default=0)


class Execution:
    """A program bound to an arena, to a packed layer and to kernels; `run` allocates nothing.

    `arena` is uint8 and `arena_bytes` long, or `shared_arena_bytes` where executions of several
    programs or layers share it: what it holds between runs is lost, but for `output`. `state` is
    uint8, `Plan.state_bytes` long: the layer's own, shared by its programs of one `CacheShape`
    (prefill and decode), never by layers. What it holds at first does not matter. `scalars` are
    tensors by name, of the dtype and shape of `Program.scalars`: those that all layers share. Their
    numbers are read when the steps run, wherever they run: whoever changes them in place changes
    the next run, also of a CUDA graph that was recorded before. `only` takes some of the steps:
    what is timed or compared alone.
    """

    def __init__(
        self,
        program: Program,
        plan: ArenaPlan,
        layer: Weights,
        kernels: ModuleType,
        arena: Tensor,
        only: Callable[[Step], bool] = lambda _: True,
        *,
        state: Tensor | None = None,
        scalars: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert arena.dtype == torch.uint8
        assert arena.numel() >= arena_bytes(program, plan, kernels)
        self._kernels = kernels
        # The last bytes: programs that share the arena have their workspace in common.
        self._workspace = arena[arena.numel() - _workspace_bytes(program, kernels) :]
        # Zero at first, without a kernel; kernels leave it so.
        self._workspace.copy_(torch.zeros(len(self._workspace), dtype=torch.uint8))
        self._buffers = {buffer.name: buffer for buffer in program.buffers}
        self._memory = {name: (arena, offset) for name, offset in plan.offsets.items()}
        self._bind(program, plan, state, scalars or {})
        self._calls: list[Callable[[], None]] = []
        self._steps = list(filter(only, program.steps))
        for step in self._steps:
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

    def _bind(
        self, program: Program, plan: ArenaPlan, state: Tensor | None, scalars: Mapping[str, Tensor]
    ) -> None:
        """State and scalars."""
        if plan.state_bytes:
            assert state is not None
            assert (state.dtype, state.numel() >= plan.state_bytes) == (torch.uint8, True)
            self._memory |= {name: (state, offset) for name, offset in plan.state.items()}
        for buffer in program.scalars:
            given = scalars[buffer.name]
            assert given.shape == (buffer.rows, buffer.columns)
            assert given.dtype == getattr(torch, buffer.dtype)
            assert given.is_contiguous()
            self._memory[buffer.name] = given.view(-1).view(torch.uint8), 0
        self._buffers |= {buffer.name: buffer for buffer in (*program.state, *program.scalars)}

    def run(self) -> None:
        """One pass over what `input` holds."""
        self._kernels.use_workspace(self._workspace)
        for call in self._calls:
            call()

    def first_overflow(self) -> str | None:
        """One pass that looks at what each step writes: the first step with a value that is NaN or
        infinite, in words; None if there is none. It waits for the device at every step."""
        self._kernels.use_workspace(self._workspace)
        for number, (step, call) in enumerate(zip(self._steps, self._calls, strict=True)):
            call()
            for rows in step.writes.values():
                written = self._view(rows)
                if written.is_floating_point() and not written.isfinite().all():
                    names = ", ".join(step.weights.values())
                    return f"step {number}, {step.kernel}{f' ({names})' if names else ''}"
        return None

    def _whole(self, name: str) -> Tensor:
        return self._view(Rows(name, 0, self._buffers[name].rows))

    def _view(self, rows: Rows) -> Tensor:
        buffer = self._buffers[rows.buffer]
        row_bytes = buffer.nbytes // buffer.rows
        memory, offset = self._memory[rows.buffer]
        start = offset + rows.start * row_bytes
        part = memory[start : start + rows.count * row_bytes]
        return part.view(getattr(torch, buffer.dtype)).view(rows.count, buffer.columns)
