"""The meter, checked: a worker allocates a known number of bytes, and the meter must read them.

This file is a framework too, so that the allocation is measured the very way a layer is. Its
session takes the bytes in phase `weights`; what the meter reads is the end of that phase minus the
end of the phase before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.case import Case, Shape
from memladder.errors import DeviceError
from memladder.frameworks.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)
from memladder.measure import devices
from memladder.measure.runner import Limits, run_once
from memladder.models import LayerConfig
from memladder.units import MIB

if TYPE_CHECKING:
    import numpy as np

SIZES = (1 * MIB, 64 * MIB, 1000 * MIB)
_STEADY_S = 0.2
# cuda.h, CUresult
_CUDA_ERROR_OUT_OF_MEMORY = 2


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
        case = Case("calibration", "calibration", Shape(1, 1), device)
        job = Job(case, LayerConfig("calibration", {"bytes": size}), log_path.parent)
        run = run_once(
            job,
            __name__,
            variables={},
            limits=limits or Limits(timeout_s=120.0),
            log_path=log_path,
            steady_s=_STEADY_S,
        )
        ends = {phase.name: phase.end_bytes for phase in run.phases}
        yield Reading(device, size, ends["weights"] - ends["context"])


class _KnownBytes(Session):
    """What both sessions share: nothing is compiled, nothing is computed."""

    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        self.size = int(job.config.values["bytes"])

    def compile(self) -> None:
        pass

    def run(self) -> None:
        pass

    def output(self) -> np.ndarray:
        """Nothing is computed, so the output is empty."""
        import numpy as np

        return np.empty((0, 0, 0), np.float32)

    def settings(self) -> Mapping[str, Setting]:
        return {}

    def categories(self) -> Mapping[str, int]:
        return {"weights": self.size}


class _HostSession(_KnownBytes):
    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        import numpy

        super().__init__(job, announce)
        self._numpy = numpy

    def context(self) -> None:
        pass

    def weights(self) -> None:
        # Ones, because pages of zeros would not be there until they are touched.
        self._array = self._numpy.ones(self.size, dtype=self._numpy.uint8)


class _CudaSession(_KnownBytes):
    """Takes device memory through the CUDA driver API alone.

    Source: CUDA driver API reference, primary context management and memory management.
    """

    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._pointer = ctypes.c_uint64()

    def context(self) -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        index = int(self.job.case.device.removeprefix("cuda:"))
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def weights(self) -> None:
        self._call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(self.size))

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result == _CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{name}: out of device memory", self.size)
        if result != 0:
            raise RuntimeError(f"{name} returned {result}")


class Calibration(Framework):
    """Known bytes in the place of a layer."""

    title = "Calibration"
    packages = ()

    def availability(self, device: str) -> Availability:
        try:
            devices.device(device)
        except DeviceError as error:
            return Availability(False, reason=str(error))
        return Availability(True)

    def tolerance(self, device: str) -> float:
        """Nothing is computed, so nothing can differ."""
        del device
        return 0.0

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        kind = _HostSession if job.case.device == "cpu" else _CudaSession
        return kind(job, announce)


FRAMEWORK = Calibration()
