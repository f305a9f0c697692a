"""Whose bytes they are when memory is short: the case's own need, or what others hold."""

from pathlib import Path

import pytest

from memladder.core.host import HostMemory
from memladder.core.processes import Resident
from memladder.core.units import GIB, MIB
from memladder.meter.outside.shortage import HostGuard, Shortage
from tests.unit.core.test_host import machine


def use(root: Path, available_gib: float) -> None:
    """From now on that much of the 16 GiB is available."""
    (root / "proc/meminfo").write_text(
        f"MemTotal: {16 << 20} kB\nMemAvailable: {int(available_gib * (1 << 20))} kB\n"
    )


def test_the_cases_own_growth_is_out_of_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, 13)
    guard = HostGuard(HostMemory(root), 0.92, None)
    use(root, 1)
    found = guard.breach(Resident(12 * GIB, 12 * GIB), [])
    assert found is not None
    assert found.is_own
    assert found.reason == (
        "host memory: 15.0 GiB of 16.0 GiB were in use, 12.0 GiB of it by the case; "
        "the limit is 92%"
    )
    assert guard.fullest == pytest.approx(15 / 16)


@pytest.mark.parametrize(
    ("before", "own", "why"),
    [
        (15.5, 12, "others grew meanwhile"),
        (0.5, 0.25, "the host was full before the case began"),
        (3, 2, "others held most of it all the time"),
    ],
)
def test_what_others_hold_is_busy(tmp_path: Path, before: float, own: float, why: str) -> None:
    root = machine(tmp_path, 1)
    use(root, before)
    guard = HostGuard(HostMemory(root), 0.92, None)
    use(root, 0.5)
    held = Resident(int(own * GIB), int(own * GIB))
    found = guard.breach(held, [])
    assert found is not None, why
    assert not found.is_own, why
    assert f"{own * 1024:.1f} MiB of it by the case" in found.reason or "12.0 GiB" in found.reason


def test_pages_that_files_share_are_no_growth_of_the_case(tmp_path: Path) -> None:
    """Weights that are mapped are given back: 9 GiB of others stay 9 GiB."""
    root = machine(tmp_path, 15)
    guard = HostGuard(HostMemory(root), 0.92, None)
    use(root, 1)
    found = guard.breach(Resident(14 * GIB, 6 * GIB), [])
    assert found is not None
    assert not found.is_own


def test_a_limit_of_the_cases_own_is_its_own(tmp_path: Path) -> None:
    guard = HostGuard(HostMemory(machine(tmp_path, 15)), 0.95, 100 * MIB)
    assert guard.breach(Resident(99 * MIB, 1), []) is None
    found = guard.breach(Resident(101 * MIB, 1), [])
    assert found is not None
    assert found.is_own
    assert "its limit is 100.0 MiB" in found.reason


@pytest.mark.parametrize(
    ("own", "others", "asked", "explained"),
    [
        (70, 0.5, 15, True),  # 85 of 80 GB: too large beside nobody.
        (70, 9, 15, True),
        (20, 50, 15, False),  # It would have fitted.
        (70, 5, 8, False),
        (70, 0.5, 9.8, True),  # The driver's own is no other's.
        (20, 45, None, True),  # There was room: something else refused.
        (30, 45, None, False),
        (70, 8, None, True),
    ],
)
def test_an_allocation_that_failed(
    own: float, others: float, asked: float | None, explained: bool
) -> None:
    short = Shortage(*(int(x * GIB) for x in (own, others, 80)))
    assert short.explains(None if asked is None else int(asked * GIB)) is explained
