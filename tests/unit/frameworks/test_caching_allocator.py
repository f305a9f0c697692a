"""The replay of PyTorch's allocator: invariants, and pages counted by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memladder.core.units import MIB
from memladder.frameworks._rules.caching_allocator import CachingAllocator
from memladder.frameworks._rules.passes import Passes, Step

_SIZES = st.one_of(st.integers(1, 4 << 20), st.integers(1 << 20, 512 << 20))


@given(st.lists(st.tuples(_SIZES, st.booleans()), max_size=60))
def test_what_is_handed_out_is_reserved_and_all_comes_back(actions: list[tuple[int, bool]]) -> None:
    allocator = CachingAllocator()
    held = []
    for size, release in actions:
        held.append(allocator.malloc(size))
        if release and len(held) > 1:
            allocator.free(held.pop(0))
        assert allocator.allocated <= allocator.reserved
        assert allocator.reserved % (2 * MIB) == 0
        assert allocator.peak_reserved >= allocator.reserved
    allocator.free(*held)
    assert allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0


@pytest.mark.parametrize(
    ("size", "reserved"),
    # Up to 1 MiB from pages of 2 MiB, more from pages of 20 (c10: kSmallSize, kLargeBuffer).
    [(1, 2), (MIB, 2), (MIB + 1, 20), (20 * MIB, 20), (20 * MIB + 1, 40), (448 * MIB, 460)],
)
def test_pages(size: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(size)
    assert allocator.reserved == reserved * MIB


def test_a_hole_is_taken_before_a_new_page() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(30 * MIB)
    allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.malloc(25 * MIB)
    assert allocator.reserved == 60 * MIB


def test_whole_free_pages_go_back_and_parts_stay() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(50 * MIB)
    allocator.malloc(5 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    # The second lies in the third page, which stays: 40 to 60 MiB.
    assert allocator.reserved == 20 * MIB


def test_a_planned_buffer_is_the_last_one_of_its_size_that_is_over() -> None:
    allocator = CachingAllocator()
    steps = [Step("a", 30 * MIB), Step("b", 30 * MIB, ("a",)), Step("c", 30 * MIB, ("b",))]
    output = Passes(allocator, {}).run(steps)
    assert allocator.peak_allocated == 60 * MIB
    allocator.free(output)
    assert allocator.allocated == 0


def test_an_operator_takes_its_own() -> None:
    allocator = CachingAllocator()
    steps = [Step("a", 30 * MIB), Step("b", 30 * MIB, ("a",), planned=False, before=(8 * MIB,))]
    Passes(allocator, {}).run(steps)
    assert allocator.peak_allocated == 68 * MIB


def test_workspaces_are_taken_once() -> None:
    allocator = CachingAllocator()
    passes = Passes(allocator, {"cublas": 32 * MIB})
    for _ in range(2):
        output = passes.run([Step("a", 4 * MIB, libraries=("cublas",))])
        allocator.free(output)
    assert allocator.allocated == 32 * MIB
