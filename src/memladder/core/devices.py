"""NVIDIA devices as NVML shows them, from outside any CUDA program.

The one place that knows which GPU `cuda:N` is. A driver may refuse to tell the memory of a device
(Grace Blackwell's GB10, Jetson, a slice in a container): that is `UNKNOWN`, never an error.
"""

from __future__ import annotations

import importlib
import os
import re
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
    def compute_capability(self) -> tuple[int, int] | None:
        """Major and minor; None where the driver does not tell."""
        found = _asked(self._library, "nvmlDeviceGetCudaComputeCapability", self._handle)
        if found is None:
            # A slice is of its GPU's kind.
            name = "nvmlDeviceGetDeviceHandleFromMigDeviceHandle"
            whole = _asked(self._library, name, self._handle)
            found = whole and _asked(self._library, "nvmlDeviceGetCudaComputeCapability", whole)
        return (int(found[0]), int(found[1])) if found else None

    @property
    def memory_bytes(self) -> int | None:
        """Memory in all, what the driver keeps for itself included; None where it is not told."""
        memory = self._memory()
        return None if memory is None else int(memory.total)

    def used_bytes(self) -> int:
        """Memory in use by all processes, without what the driver keeps for itself; `UNKNOWN` where
        it is not told."""
        memory = self._memory()
        return UNKNOWN if memory is None else int(memory.used)

    def processes(self) -> tuple[DeviceProcess, ...]:
        """Processes with a compute context; empty too where NVML does not list them."""
        name = "nvmlDeviceGetComputeRunningProcesses_v3"
        found = _asked(self._library, name, self._handle) or ()
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
        version = self._library.nvmlMemory_v2
        return _asked(self._library, "nvmlDeviceGetMemoryInfo", self._handle, version=version)


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
        return tuple(Device(self._library, handle) for handle in self._handles())

    def visible(self, chosen: str | None) -> tuple[Device, ...]:
        """The GPUs that a CUDA program sees as 0, 1, …, given CUDA_VISIBLE_DEVICES.

        Numbers are in PCI order: the runner sets CUDA_DEVICE_ORDER so. As in CUDA, the first entry
        that names no GPU ends the list, a list that names one twice is empty, all entries are of
        the first one's kind (number, `GPU-…`, `MIG-…`), and identifiers may be cut as far as they
        stay unique. A GPU that is cut into slices stands for its first; a slice ends the list.
        Sources: CUDA programming guide, "CUDA environment variables"; MIG user guide, "CUDA device
        enumeration"; `torch.cuda._parse_visible_devices`.
        """
        handles = self._handles()
        wanted = handles if chosen is None else self._chosen(chosen, handles)
        found: list[Device] = []
        for one in wanted:
            handle = one if self._is_slice(one) else self._usable(one)
            if handle is not None:
                found.append(Device(self._library, handle))
            if handle is None or self._is_slice(handle):
                break
        return tuple(found)

    def _handles(self) -> list[Any]:
        count = self._library.nvmlDeviceGetCount()
        return [self._library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def _chosen(self, chosen: str, handles: list[Any]) -> list[Any]:
        entries = [part.strip() for part in chosen.split(",")]
        prefix = next((one for one in ("GPU-", "MIG-") if entries[0].startswith(one)), None)
        names: list[str] = []
        for entry in entries:
            if prefix is None:
                # As C's strtoul reads it: `1st` is 1.
                number = re.match(r"\+?(\d{1,9})", entry)
                name = str(int(number[1])) if number else None
            else:
                name = entry if entry.startswith(prefix) else None
            if name is None:
                break
            if name in names:
                return []
            names.append(name)
        found: list[Any] = []
        uuids: list[str] = []
        for name in names:
            handle = self._of(name, handles)
            if handle is None:
                break
            uuid = self._library.nvmlDeviceGetUUID(handle)
            if uuid in uuids:
                return []
            found.append(handle)
            uuids.append(uuid)
        return found

    def _of(self, name: str, handles: list[Any]) -> Any:
        if name.isdecimal():
            return handles[int(name)] if int(name) < len(handles) else None
        if name.startswith("MIG-"):
            exact = _asked(self._library, "nvmlDeviceGetHandleByUUID", name)
            if exact is not None:
                return exact
            handles = [one for whole in handles for one in self._slices(whole)]
        matches = [one for one in handles if self._library.nvmlDeviceGetUUID(one).startswith(name)]
        return matches[0] if len(matches) == 1 else None

    def _usable(self, handle: Any) -> Any:
        """The GPU, or its first slice where it is cut; None where it is cut and has none."""
        mode = _asked(self._library, "nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return handle
        return next(iter(self._slices(handle)), None)

    def _slices(self, handle: Any) -> list[Any]:
        count = _asked(self._library, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
        named = "nvmlDeviceGetMigDeviceHandleByIndex"
        found = (_asked(self._library, named, handle, index) for index in range(count))
        return [one for one in found if one is not None]

    def _is_slice(self, handle: Any) -> bool:
        return str(self._library.nvmlDeviceGetUUID(handle)).startswith("MIG-")


def _asked(library: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """What NVML answers; None where it refuses, or the driver lacks the function."""
    try:
        return getattr(library, name)(*arguments, **options)
    except (library.NVMLError, AttributeError):
        return None


@cache
def nvml() -> Nvml:
    """This machine's NVML, opened once. Raises DeviceError saying why there is none."""
    try:
        library = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise DeviceError("nvidia-ml-py is not installed here, so no driver was asked") from None
    return Nvml(library)


def visible_devices() -> tuple[Device, ...]:
    """The GPUs that a CUDA program started from here would see. Raises DeviceError."""
    return nvml().visible(os.environ.get("CUDA_VISIBLE_DEVICES"))


def device(name: str) -> Device | None:
    """The GPU of a device name; None for `cpu`. Raises DeviceError, naming the devices here."""
    if name == "cpu":
        return None
    index = int(name.removeprefix("cuda:"))
    seen = visible_devices()
    if index >= len(seen):
        here = ", ".join(f"cuda:{i} ({one.name})" for i, one in enumerate(seen)) or "no GPU"
        raise DeviceError(f"{name} is not here; visible: {here}")
    return seen[index]


def compute_capability(name: str) -> tuple[int, int] | None:
    """Compute capability of a device name; None for `cpu`, and where no driver tells it."""
    try:
        found = device(name)
    except DeviceError:
        return None
    return None if found is None else found.compute_capability
