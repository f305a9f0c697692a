"""Offsets of all buffers of a program in one arena.

Buffers whose lifetimes overlap get disjoint places. A buffer that a step may write over one of its
inputs, and that is born where the input dies, takes the input's place. The rest is first fit: each
buffer gets the lowest gap that holds it among those that live at the same time, in the order of
birth, or, where that leaves gaps, in the order of size or of lifetime if one of these is better.

State outlives the run, and is no part of the arena: its buffers lie one after the other in memory
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from memladder.engine.program.steps import Buffer, Program, Step

ALIGNMENT = 256
"""What CUDA's own allocator aligns to; wide loads and tensor descriptors need 16 and 128."""
# Each pair of buffers is compared; a program of more has so many chunks that it leaves no gaps.
_MOST_COMPARED = 2000


@dataclass(frozen=True)
class ArenaPlan:
    """Byte offsets by buffer; `lower_bound` is the largest sum of bytes alive at one step.

    `state` and `state_bytes` are offsets and bytes of the memory that outlives a run. They depend
    on the state's buffers alone: programs of one cache have the same.
    """

    offsets: dict[str, int]
    nbytes: int
    lower_bound: int
    state: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0


@dataclass(frozen=True)
class _Place:
    """Memory for a buffer and for those that follow it in place; alive from first to last step."""

    buffers: tuple[str, ...]
    first: int
    last: int
    nbytes: int

    @property
    def name(self) -> str:
        return self.buffers[0]


# By a place's name.
_Offsets: TypeAlias = dict[str, int]


def plan(program: Program, alignment: int = ALIGNMENT) -> ArenaPlan:
    """Place every buffer of the program that is used."""
    places = sorted(_places(program, alignment), key=lambda place: place.first)
    bound = _most_alive(places)
    found = _first_fit(places)
    if _end(places, found) > bound and len(places) <= _MOST_COMPARED:
        for order in (_by_size, _by_lifetime):
            other = _any_order_fit(sorted(places, key=order, reverse=True))
            found = min(found, other, key=lambda offsets: _end(places, offsets))
    offsets = {name: found[place.name] for place in places for name in place.buffers}
    state, end = {}, 0
    for buffer in program.state:
        state[buffer.name] = end
        end += _aligned(buffer.nbytes, alignment)
    return ArenaPlan(offsets, _end(places, found), bound, state, end)


def _end(places: Iterable[_Place], offsets: _Offsets) -> int:
    return max(offsets[place.name] + place.nbytes for place in places)


def _by_size(place: _Place) -> tuple[int, int]:
    return place.nbytes, place.last - place.first


def _by_lifetime(place: _Place) -> tuple[int, int]:
    return place.last - place.first, place.nbytes


def _most_alive(places: Iterable[_Place]) -> int:
    """`places` are in the order of birth."""
    most = 0
    living: list[_Place] = []
    for place in places:
        living = [other for other in living if other.last >= place.first] + [place]
        most = max(most, sum(other.nbytes for other in living))
    return most


def _first_fit(places: Iterable[_Place]) -> _Offsets:
    """In the order of birth: only the living can be in the way."""
    offsets: _Offsets = {}
    living: list[_Place] = []
    for place in places:
        living = [other for other in living if other.last >= place.first]
        offsets[place.name] = _lowest_gap(living, offsets, place.nbytes)
        living.append(place)
    return offsets


def _any_order_fit(places: Iterable[_Place]) -> _Offsets:
    """In any order: whoever lives at the same time and has a place is in the way."""
    offsets: _Offsets = {}
    placed: list[_Place] = []
    for place in places:
        near = [o for o in placed if o.last >= place.first and o.first <= place.last]
        offsets[place.name] = _lowest_gap(near, offsets, place.nbytes)
        placed.append(place)
    return offsets


def _places(program: Program, alignment: int) -> list[_Place]:
    lifetimes = program.lifetimes()
    sizes = {buffer.name: _aligned(buffer.nbytes, alignment) for buffer in program.buffers}
    heirs = _heirs(program, lifetimes)
    chains: dict[str, list[str]] = {}
    for name in sorted(lifetimes, key=lambda name: lifetimes[name]):
        if name in heirs:
            chains[name] = chains[heirs[name]]
            chains[name].append(name)
        else:
            chains[name] = [name]
    return [
        _Place(tuple(chain), lifetimes[chain[0]][0], lifetimes[chain[-1]][1], sizes[chain[0]])
        for name, chain in chains.items()
        if name == chain[0]
    ]


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _heirs(program: Program, lifetimes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Buffers that take another's place: born, and alike, in the step in which the other dies.

    The step touches neither with another argument: that could be read after it was overwritten.
    """
    known = {buffer.name: buffer for buffer in program.buffers}
    found: dict[str, str] = {}
    taken: set[str] = set()
    outside = program.outside
    for number, step in enumerate(program.steps):
        for read, written in step.in_place:
            old, new = step.reads[read], step.writes[written]
            if (
                not outside & {old.buffer, new.buffer}
                and lifetimes[old.buffer][1] == lifetimes[new.buffer][0] == number
                and _alike(known[old.buffer], known[new.buffer])
                and old.count == new.count == known[old.buffer].rows
                and _arguments(step, old.buffer) == _arguments(step, new.buffer) == 1
                and new.buffer not in found
                and old.buffer not in taken
            ):
                found[new.buffer] = old.buffer
                taken.add(old.buffer)
    return found


def _arguments(step: Step, buffer: str) -> int:
    return sum(rows.buffer == buffer for rows in (*step.reads.values(), *step.writes.values()))


def _alike(one: Buffer, other: Buffer) -> bool:
    """Of one shape and dtype: each element then lies where the other's does."""
    return replace(one, name=other.name) == other


def _lowest_gap(near: Iterable[_Place], offsets: _Offsets, nbytes: int) -> int:
    end = 0
    for other in sorted(near, key=lambda place: offsets[place.name]):
        if offsets[other.name] - end >= nbytes:
            break
        end = max(end, offsets[other.name] + other.nbytes)
    return end
