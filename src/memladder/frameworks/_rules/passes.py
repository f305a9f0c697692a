"""A pass of a compiled layer as steps that take and give back buffers, and what it reserves.

Inductor plans reuse while it writes the code: a buffer whose last use is over may become a later
one of the same size, the last one first (torch/_inductor/codegen/wrapper.py, `AllocateLine.plan`,
`FreeIfNotReusedLine`); what is never reused is freed at once. Operators outside of Inductor
allocate for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memladder.frameworks._rules.caching_allocator import Allocation, CachingAllocator


@dataclass(frozen=True)
class Step:
    """One kernel: the buffer it makes, `nbytes` large, and the buffers whose last use this is.

    `planned`: Inductor makes the buffer, and may reuse an old one. `inside` are bytes that live
    during the kernel only. `in_place` names the buffer that becomes this one.
    """

    name: str
    nbytes: int
    last: tuple[str, ...] = ()
    planned: bool = True
    inside: tuple[int, ...] = ()
    in_place: str | None = None


def _reuse(steps: Sequence[Step]) -> dict[str, str]:
    """For each buffer that is another's memory: the one that it takes over."""
    sizes = {step.name: step.nbytes for step in steps}
    pool: dict[int, list[str]] = {}
    found: dict[str, str] = {}
    for step in steps:
        if step.in_place is not None:
            found[step.name] = step.in_place
        elif step.planned and pool.get(step.nbytes):
            found[step.name] = pool[step.nbytes].pop()
        for name in step.last:
            if name in sizes and name != step.in_place:
                pool.setdefault(sizes[name], []).append(name)
    return found


def run(allocator: CachingAllocator, steps: Sequence[Step]) -> Allocation | None:
    """Work off the steps; the last one's buffer is the output, and is kept."""
    taken = _reuse(steps)
    reused = set(taken.values())
    held: dict[str, Allocation | None] = {}
    for step in steps:
        if step.name in taken:
            held[step.name] = held.pop(taken[step.name])
        else:
            held[step.name] = allocator.malloc(step.nbytes)
        inside = [allocator.malloc(size) for size in step.inside]
        allocator.free(*inside)
        for name in step.last:
            if name not in reused and name in held:
                allocator.free(held.pop(name))
    output = held.pop(steps[-1].name)
    allocator.free(*held.values())
    return output
