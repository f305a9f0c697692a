"""A pass of a compiled layer as steps that take and give back buffers, and what it reserves.

Inductor plans reuse while it writes the code: a buffer whose last use is over becomes the next one
of its size, the last one first (torch/_inductor/codegen/wrapper.py, `AllocateLine.plan`,
`FreeIfNotReusedLine`); what is not reused is freed at once. Operators outside of Inductor
allocate for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memladder.frameworks._rules.caching_allocator import Allocation, CachingAllocator


@dataclass(frozen=True)
class Step:
    """One kernel: the buffer it makes, `nbytes` large, and the buffers whose last use this is.

    `planned`: Inductor makes the buffer, and may reuse an old one; else an operator makes it.
    `before` and `after` are bytes that live during the kernel only, taken before the buffer or
    after it. `in_place` names the buffer that becomes this one. `libraries` are asked for a handle,
    and take their workspaces then.
    """

    name: str
    nbytes: int
    last: tuple[str, ...] = ()
    planned: bool = True
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    in_place: str | None = None
    libraries: tuple[str, ...] = ()


def _reuse(steps: Sequence[Step]) -> dict[str, str]:
    """For each buffer that is another's memory: the one that it takes over."""
    sizes = {step.name: step.nbytes for step in steps}
    over: dict[int, list[str]] = {}
    found: dict[str, str] = {}
    for step in steps:
        if step.in_place is not None:
            found[step.name] = step.in_place
        elif step.planned and over.get(step.nbytes):
            found[step.name] = over[step.nbytes].pop()
        for name in step.last:
            if name != step.in_place:
                over.setdefault(sizes[name], []).append(name)
    return found


class Passes:
    """An allocator at work: workspaces of libraries are taken once, and kept."""

    def __init__(self, allocator: CachingAllocator, workspaces: Mapping[str, int]) -> None:
        self._allocator, self._workspaces = allocator, workspaces
        self.taken: dict[str, int] = {}

    def run(self, steps: Sequence[Step]) -> Allocation | None:
        """Work off the steps; the last one's buffer is the output, and is kept."""
        allocator, taken = self._allocator, _reuse(steps)
        reused = set(taken.values())
        held: dict[str, Allocation | None] = {}
        for step in steps:
            inside = [allocator.malloc(size) for size in step.before]
            if step.name in taken:
                held[step.name] = held.pop(taken[step.name])
            else:
                held[step.name] = allocator.malloc(step.nbytes)
            for library in step.libraries:
                if library not in self.taken:
                    self.taken[library] = self._workspaces[library]
                    allocator.malloc(self._workspaces[library])
            inside += [allocator.malloc(size) for size in step.after]
            allocator.free(*inside)
            for name in step.last:
                if name not in reused and name in held:
                    allocator.free(held.pop(name))
        output = held.pop(steps[-1].name)
        allocator.free(*held.values())
        return output
