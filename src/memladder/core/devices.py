"""NVIDIA devices as NVML shows them, from outside any CUDA program."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from memladder.core import processes
from memladder.core.errors import DeviceError

UNKNOWN = -1
"""Stands for bytes that NVML does not tell."""


class DeviceProcess(NamedTuple):
    """A process with memory on a device; `used_bytes` is None where NVML does not tell it."""

    pid: int
    used_bytes: int | None

    @property
    def name(self) -> str:
        """Its short name; `unknown` for one of another process namespace."""
        return processes.name(self.pid) or "unknown"


class Reading(NamedTuple):
    """One poll: bytes of our processes (`UNKNOWN` where not told), of the device, and the others.

    `ours` counts what NVML attributes to `pids`; 0 as long as none of them is on the device.
    """

    ours: int
    total: int
    others: tuple[DeviceProcess, ...]


class Device:
    """One GPU, by its NVML handle."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    @property
    def name(self) -> str:
        """Product name, e.g. `NVIDIA H100 80GB HBM3`."""
        return str(self._library.nvmlDeviceGetName(self._handle))

    @property
    def memory_bytes(self) -> int:
        """Memory in all, what the driver keeps for itself included."""
        return int(self._memory().total)

    def used_bytes(self) -> int:
        """Memory in use by all processes, without what the driver keeps for itself."""
        return int(self._memory().used)

    def processes(self) -> tuple[DeviceProcess, ...]:
        """Processes with a compute context; empty too where NVML does not list them."""
        try:
            found = self._library.nvmlDeviceGetComputeRunningProcesses_v3(self._handle)
        except (
            self._library.NVMLError_NotSupported,
            self._library.NVMLError_NoPermission,
            self._library.NVMLError_FunctionNotFound,
        ):
            return ()
        return tuple(DeviceProcess(int(one.pid), one.usedGpuMemory) for one in found)

    def read(self, pids: Iterable[int]) -> Reading:
        """Poll the device; `pids` are our processes."""
        ours, mine = 0, set(pids)
        others = []
        for process in self.processes():
            if process.pid not in mine:
                others.append(process)
            elif process.used_bytes is None:
                ours = UNKNOWN
            elif ours != UNKNOWN:
                ours += process.used_bytes
        return Reading(ours, self.used_bytes(), tuple(others))

    def _memory(self) -> Any:
        # Version 2 counts the driver's own reserve apart, as nvidia-smi does.
        return self._library.nvmlDeviceGetMemoryInfo(
            self._handle, version=self._library.nvmlMemory_v2
        )


class Nvml:
    """NVIDIA's management library, opened."""

    def __init__(self, library: Any) -> None:
        """Raises DeviceError where no driver answers."""
        self._library = library
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            raise DeviceError(f"no NVIDIA driver answers: {error}") from None

    @property
    def driver(self) -> str:
        """The driver's version."""
        return str(self._library.nvmlSystemGetDriverVersion())

    @property
    def cuda(self) -> str:
        """The newest CUDA version that the driver supports, e.g. `13.0`."""
        version = int(self._library.nvmlSystemGetCudaDriverVersion_v2())
        return f"{version // 1000}.{version % 1000 // 10}"

    def devices(self) -> tuple[Device, ...]:
        """All GPUs of the machine, in PCI order."""
        count = self._library.nvmlDeviceGetCount()
        return tuple(self._by_index(index) for index in range(count))

    def visible(self, chosen: str | None) -> tuple[Device, ...]:
        """The GPUs that a CUDA program sees as 0, 1, …, given CUDA_VISIBLE_DEVICES.

        Numbers are in PCI order: the runner sets CUDA_DEVICE_ORDER so. As in CUDA, the first
        entry that names no GPU ends the list.
        Source: CUDA programming guide, "CUDA environment variables".
        """
        if chosen is None:
            return self.devices()
        found: list[Device] = []
        for entry in (part.strip() for part in chosen.split(",")):
            device = self._named(entry)
            if device is None:
                break
            found.append(device)
        return tuple(found)

    def _by_index(self, index: int) -> Device:
        return Device(self._library, self._library.nvmlDeviceGetHandleByIndex(index))

    def _named(self, entry: str) -> Device | None:
        library = self._library
        if entry.isdecimal():
            return self._by_index(int(entry)) if int(entry) < library.nvmlDeviceGetCount() else None
        if entry.startswith("MIG-"):
            try:
                return Device(library, library.nvmlDeviceGetHandleByUUID(entry))
            except library.NVMLError:
                return None
        if not entry.startswith("GPU-"):
            return None
        handles = [
            library.nvmlDeviceGetHandleByIndex(index)
            for index in range(library.nvmlDeviceGetCount())
        ]
        # CUDA takes the beginning of an identifier if only one device has it.
        matches = [one for one in handles if library.nvmlDeviceGetUUID(one).startswith(entry)]
        return Device(library, matches[0]) if len(matches) == 1 else None


@cache
def nvml() -> Nvml:
    """This machine's NVML, opened once. Raises DeviceError saying why there is none."""
    return Nvml(importlib.import_module("pynvml"))


def visible_devices() -> tuple[Device, ...]:
    """The GPUs that a CUDA program started from here would see. Raises DeviceError."""
    return nvml().visible(os.environ.get("CUDA_VISIBLE_DEVICES"))


def device(name: str) -> Device | None:
    """The GPU of a device name; None for `cpu`. Raises DeviceError naming what is here."""
    if name == "cpu":
        return None
    index = int(name.removeprefix("cuda:"))
    seen = visible_devices()
    if index >= len(seen):
        here = ", ".join(f"cuda:{i} ({one.name})" for i, one in enumerate(seen)) or "no GPU"
        raise DeviceError(f"{name} is not here; visible: {here}")
    return seen[index]
