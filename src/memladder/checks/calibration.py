"""The meter, checked: a worker allocates a known number of bytes, and the meter must read them.

The worker's side is `known_bytes`. What the meter reads is the end of phase `weights` minus the end
of the phase before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memladder.core.case import Case, Workload
from memladder.core.units import MIB
from memladder.frameworks._shared.base import Job
from memladder.meter.inside import known_bytes
from memladder.meter.outside.runner import Limits, run_once
from memladder.models import LayerConfig

SIZES = (1 * MIB, 64 * MIB, 1000 * MIB)
_STEADY_S = 0.2


@dataclass(frozen=True)
class Reading:
    """Bytes that the worker took, and bytes that the meter read; both from outside alike."""

    device: str
    asked_bytes: int
    read_bytes: int

    @property
    def bound_bytes(self) -> int:
        """How far they may differ: 2 MiB, the driver's granularity; 1 % more on the CPU."""
        return 2 * MIB + (self.asked_bytes // 100 if self.device == "cpu" else 0)

    @property
    def holds(self) -> bool:
        """Is the difference within the bound?"""
        return abs(self.read_bytes - self.asked_bytes) <= self.bound_bytes


def calibrate(
    device: str, log_path: Path, sizes: Sequence[int] = SIZES, limits: Limits | None = None
) -> Iterator[Reading]:
    """Take each of `sizes` bytes on `device` in a process of its own, and read them.

    Raises DeviceError, and WorkerError when a worker fails.
    """
    for size in sizes:
        case = Case("bytes", "known_bytes", Workload(1, 1), device)
        job = Job(case, LayerConfig("bytes", {"bytes": size}), log_path.parent)
        run = run_once(
            job,
            known_bytes.__name__,
            variables={},
            limits=limits or Limits(timeout_s=120.0),
            log_path=log_path,
            steady_s=_STEADY_S,
        )
        ends = {phase.name: phase.end_bytes for phase in run.phases}
        yield Reading(device, size, ends["weights"] - ends["context"])
