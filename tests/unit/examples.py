"""Records for tests: invented here, used here, never shown as a measurement."""

from __future__ import annotations

import dataclasses
from typing import Any

from memladder.core.case import Case, Workload
from memladder.core.record import (
    Environment,
    LayerFacts,
    Machine,
    PhaseUse,
    Record,
    Run,
    Source,
    Status,
    TracePoint,
)
from memladder.core.units import GIB, MIB
from memladder.core.verification import Check, Verification

MACHINE = Machine("Test CPU", 24 * GIB, None, None, "Test CPU", 2, 24 * GIB, "Test OS 1", "6.1")
ENVIRONMENT = Environment(MACHINE, "3.11.7", {"torch": "2.13.0"}, {}, "abc1234", "0.1.0")
LAYER = LayerFacts({"hidden_size": 8192}, "0123456789ab", 855_654_400, 1_711_308_800, 0)


def run(steady: int, peak: int) -> Run:
    """A run with two phases."""

    def phase(name: str, start: float, size: int) -> PhaseUse:
        return PhaseUse(name, start, start + 1, 100, size, size, None, None, size, size, size, 0)

    return Run(
        started="2026-01-02T03:04:05+00:00",
        source=Source.PSS,
        phases=(phase("weights", 0, peak), phase("steady", 1, steady)),
        passes=3,
        polls=200,
        polls_per_s=100.0,
        longest_gap_s=0.012,
        idle_device_bytes=None,
        foreign=(),
        categories={"weights": 1_711_308_800},
        trace=(TracePoint(0.0, None, 1, 2),),
    )


def record(
    model: str = "llama",
    framework: str = "pytorch",
    shape: Workload = Workload(1, 1),
    device: str = "cpu",
    steady: tuple[int, ...] = (2000 * MIB,),
    **changes: Any,
) -> Record:
    """A measured record, or with `status` and `reason` given one that is not."""
    made = Record(
        case=Case(model, framework, shape, device),
        status=Status.MEASURED,
        reason=None,
        hint=None,
        asked_bytes=None,
        layer=LAYER,
        settings={"dtype": "float16", "threads": 2},
        environment=ENVIRONMENT,
        runs=tuple(run(size, size + 100 * MIB) for size in steady),
    )
    if changes.get("status", Status.MEASURED) is not Status.MEASURED:
        changes = {"runs": (), **changes}
    return dataclasses.replace(made, **changes)


def elsewhere(device: str = "Other CPU") -> Environment:
    """The environment of another machine."""
    return dataclasses.replace(ENVIRONMENT, machine=dataclasses.replace(MACHINE, device=device))


def verification(framework: str = "pytorch", error: float = 1e-3) -> Verification:
    """A framework's check at one shape."""
    check = Check("llama", Workload(1, 1), 1, error, 2e-3)
    return Verification(framework, "cpu", (check,), {}, ENVIRONMENT)
