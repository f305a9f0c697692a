"""An object in the place of the module pynvml, as nvidia-ml-py 13 defines what memladder calls."""

# ruff: noqa: N801, N802, N815, N818 -- the names are NVML's

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_FunctionNotFound(NVMLError):
    pass


class NVMLError_InvalidArgument(NVMLError):
    pass


@dataclass
class Gpu:
    """`processes` maps a pid to its bytes, None where the driver does not tell them. `slices` are
    its MIG devices, None where MIG is off; `tells_memory` is false where the driver refuses."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 << 30
    used: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)
    lists: bool = True
    capability: tuple[int, int] | None = (9, 0)
    tells_memory: bool = True
    slices: list[Gpu] | None = None


class FakeNvml:
    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_NoPermission = NVMLError_NoPermission
    NVMLError_FunctionNotFound = NVMLError_FunctionNotFound
    nvmlMemory_v2 = 0x2000028

    def __init__(self, *gpus: Gpu, fails: bool = False) -> None:
        self.gpus = gpus
        self.fails = fails

    def nvmlInit(self) -> None:
        if self.fails:
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            for one in (gpu, *(gpu.slices or ())):
                if one.uuid == uuid:
                    return one
        raise NVMLError_InvalidArgument("Invalid Argument")

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int) -> Any:
        assert version == self.nvmlMemory_v2
        if not gpu.tells_memory:
            raise NVMLError_NotSupported("Not Supported")
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, gpu: Gpu) -> list[Any]:
        if not gpu.lists:
            raise NVMLError_NotSupported("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.processes.items()]

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.capability is None:
            raise NVMLError_NotSupported("Not Supported")
        return gpu.capability

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        return (int(gpu.slices is not None),) * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        if index >= len(gpu.slices or ()):
            raise NVMLError_InvalidArgument("Not Found")
        return (gpu.slices or [])[index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: Gpu) -> Gpu:
        for whole in self.gpus:
            if gpu in (whole.slices or ()):
                return whole
        raise NVMLError_InvalidArgument("Invalid Argument")
