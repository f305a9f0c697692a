"""A framework that takes a known number of bytes in the place of a layer, to check the meter.

Its session takes them in phase `weights`, the very way a layer is measured. It needs nothing but
the standard library, so that it runs in any environment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from memladder.core import devices
from memladder.core.errors import DeviceError
from memladder.frameworks._shared.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)

if TYPE_CHECKING:
    import numpy as np

# cuda.h, CUresult
_CUDA_ERROR_OUT_OF_MEMORY = 2


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
    def context(self) -> None:
        pass

    def weights(self) -> None:
        # Ones, because pages of zeros would not be there until they are touched.
        self._bytes = b"\1" * self.size


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

    def weight_bytes(self, job: Job) -> int:
        """What was asked for."""
        return int(job.config.values["bytes"])

    def tolerance(self, device: str) -> float:
        """Nothing is computed, so nothing can differ."""
        del device
        return 0.0

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        kind = _HostSession if job.case.device == "cpu" else _CudaSession
        return kind(job, announce)


FRAMEWORK = Calibration()
