"""A replay of PyTorch's caching allocator with expandable segments: what it reserves.

Source: torch 2.11, c10/cuda/CUDACachingAllocator.cpp (`malloc`, `get_free_block`,
`try_allocate_expandable_block`, `map_block`, `unmap_block`, `release_cached_blocks`). One stream,
one device: each pool, small and large, is one range of addresses that grows by whole pages.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

_ROUND = 512
_SMALL = 1 << 20
_SMALL_PAGE = 2 << 20
_LARGE_PAGE = 20 << 20
_SPACE = 1 << 60


@dataclass
class _Block:
    start: int
    size: int
    mapped: bool
    used: bool = False


@dataclass
class _Pool:
    """Blocks in the order of their addresses; together they cover all of the range."""

    page: int
    blocks: list[_Block] = field(default_factory=lambda: [_Block(0, _SPACE, mapped=False)])

    def take(self, size: int) -> _Block:
        index = self._fitting(size)
        if index is None:
            index = self._grown(size)
        block = self.blocks[index]
        rest = block.size - size
        if rest >= _ROUND:
            self.blocks.insert(index + 1, _Block(block.start + size, rest, mapped=True))
            block.size = size
        block.used = True
        return block

    def give(self, block: _Block) -> None:
        block.used = False
        self._merge(self._index(block))

    def _index(self, block: _Block) -> int:
        return bisect.bisect_left(self.blocks, block.start, key=lambda one: one.start)

    def _fitting(self, size: int) -> int | None:
        """The smallest free block; of one that could grow, what it could grow to counts."""
        free = [
            (block.size, block.start, index)
            for index, block in enumerate(self.blocks)
            if block.size >= size and block.mapped and not block.used
        ]
        if not free:
            return None
        best = min(free)[2]
        if self._growable(best) == self.blocks[best].size:
            return best  # any other is as large at least
        for _, _, index in sorted(free)[1:]:
            if self._growable(index) >= self._growable(best):
                break
            best = index
        return best

    def _growable(self, index: int) -> int:
        following = self.blocks[index + 1] if index + 1 < len(self.blocks) else None
        more = following.size if following and not following.mapped else 0
        return self.blocks[index].size + more

    def _grown(self, size: int) -> int:
        """Map pages at the lowest address where the size has room, beside what is free there."""
        for index, block in enumerate(self.blocks):
            if block.mapped:
                continue
            first = index
            if index and self.blocks[index - 1].mapped and not self.blocks[index - 1].used:
                first = index - 1
            if self._room(first) >= size:
                return self._map(first, size)
        raise AssertionError("the range of addresses is larger than any size")

    def _room(self, index: int) -> int:
        total = 0
        while index < len(self.blocks) and not self.blocks[index].used:
            total += self.blocks[index].size
            index += 1
        return total

    def _map(self, index: int, size: int) -> int:
        while True:
            block = self.blocks[index]
            if block.mapped and block.size >= size:
                return index
            target = index if not block.mapped else index + 1
            unmapped = self.blocks[target]
            missing = size - (block.size if block.mapped else 0)
            pages = min(-(-missing // self.page) * self.page, unmapped.size)
            if pages < unmapped.size:
                rest = _Block(unmapped.start + pages, unmapped.size - pages, mapped=False)
                self.blocks.insert(target + 1, rest)
            unmapped.size, unmapped.mapped = pages, True
            index = self._merge(target)

    def _merge(self, index: int) -> int:
        """Join a free block with free neighbours in the same state; its new index."""
        for step in (0, -1):
            left = index + step
            if left < 0 or left + 1 >= len(self.blocks):
                continue
            one, two = self.blocks[left], self.blocks[left + 1]
            if one.used or two.used or one.mapped != two.mapped:
                continue
            one.size += two.size
            del self.blocks[left + 1]
            index = left
        return index

    def release(self) -> None:
        """Unmap every whole page inside free blocks."""
        index = 0
        while index < len(self.blocks):
            block = self.blocks[index]
            first = -(-block.start // self.page) * self.page
            last = (block.start + block.size) // self.page * self.page
            if block.used or not block.mapped or last <= first:
                index += 1
                continue
            parts = [
                _Block(block.start, first - block.start, mapped=True),
                _Block(first, last - first, mapped=False),
                _Block(last, block.start + block.size - last, mapped=True),
            ]
            kept = [part for part in parts if part.size]
            self.blocks[index : index + 1] = kept
            index = self._merge(index + next(i for i, p in enumerate(kept) if not p.mapped)) + 1

    @property
    def reserved(self) -> int:
        return sum(block.size for block in self.blocks if block.mapped)


@dataclass(frozen=True)
class Allocation:
    """What `malloc` gave: to be handed back to `free`."""

    block: _Block
    small: bool


class CachingAllocator:
    """Bytes handed out and reserved, and the highest of both since `reset_peaks`.

    >>> allocator = CachingAllocator()
    >>> weight = allocator.malloc(448 << 20)
    >>> allocator.reserved >> 20
    460
    """

    def __init__(self) -> None:
        self._pools = {True: _Pool(_SMALL_PAGE), False: _Pool(_LARGE_PAGE)}
        self.allocated = self.peak_allocated = self.peak_reserved = 0

    def malloc(self, size: int) -> Allocation | None:
        """A block of at least `size` bytes; None for nothing."""
        if size <= 0:
            return None
        rounded = -(-size // _ROUND) * _ROUND
        small = rounded <= _SMALL
        block = self._pools[small].take(rounded)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Allocation(block, small)

    def free(self, *allocations: Allocation | None) -> None:
        """Give blocks back to the cache."""
        for allocation in allocations:
            if allocation is not None:
                self.allocated -= allocation.block.size
                self._pools[allocation.small].give(allocation.block)

    def empty_cache(self) -> None:
        """Give free pages back to the driver."""
        for pool in self._pools.values():
            pool.release()

    def reset_peaks(self) -> None:
        """Peaks begin at what is held now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    @property
    def reserved(self) -> int:
        """Bytes taken from the driver."""
        return sum(pool.reserved for pool in self._pools.values())
