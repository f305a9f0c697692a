"""What `memladder doctor` looks at: whether this machine can measure, and what to fix if not."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memladder.core import devices, processes
from memladder.core.devices import Device, Nvml
from memladder.core.errors import DeviceError
from memladder.core.host import HostMemory
from memladder.core.units import format_bytes
from memladder.frameworks._shared import torch_common
from memladder.meter.environment import cpu_name

# A device with this much in use before a case leaves less for it than its memory says.
_BUSY_SHARE = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` says what to do where it is not `good`."""

    subject: str
    text: str
    good: bool = True
    fix: str | None = None


def findings() -> tuple[Finding, ...]:
    """Everything about this machine that decides what can be measured, in order of weight."""
    return (*_gpus(), *_host(), _torch(), *_compilers(), _headers())


def _gpus() -> Iterator[Finding]:
    try:
        nvml = devices.nvml()
    except DeviceError as error:
        yield Finding(
            "GPU", str(error), False, "install the NVIDIA driver, or measure on --device cpu"
        )
        return
    yield from gpu_findings(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_findings(nvml: Nvml, chosen: str | None) -> Iterator[Finding]:
    """Driver, GPUs and who is on them; `chosen` is the value of CUDA_VISIBLE_DEVICES."""
    yield Finding("driver", f"{nvml.driver}, for CUDA up to {nvml.cuda}")
    visible = nvml.visible(chosen)
    if not visible:
        there = len(nvml.devices())
        yield Finding(
            "GPU",
            f"none of {there} visible" if there else "none",
            False,
            f"CUDA_VISIBLE_DEVICES is {chosen!r}; unset it to see all" if there else None,
        )
    for index, device in enumerate(visible):
        yield from _gpu(f"cuda:{index}", device)


def _gpu(name: str, device: Device) -> Iterator[Finding]:
    used, total = device.used_bytes(), device.memory_bytes
    if total is None:
        yield Finding(name, f"{device.name}; the driver does not tell its memory, only processes'")
    else:
        text = f"{device.name}, {format_bytes(used)} of {format_bytes(total)} in use"
        busy = used > _BUSY_SHARE * total
        fix = "end what runs on it, or expect less room" if busy else None
        yield Finding(name, text, not busy, fix)
    for process in device.processes():
        told = process.used_bytes is not None
        size = format_bytes(process.used_bytes) if process.used_bytes is not None else "unknown"
        yield Finding(
            f"{name} process",
            f"{process.pid} {process.name}, {size}",
            told,
            None if told else "the driver tells no bytes per process; device deltas will be used",
        )


def _host() -> Iterator[Finding]:
    use = HostMemory().read()
    cores = len(os.sched_getaffinity(0))
    yield Finding("processor", f"{cpu_name()}, {cores} cores")
    text = f"{format_bytes(use.used)} of {format_bytes(use.limit)} in use"
    yield Finding("host memory", text)
    own = processes.pages(os.getpid()).pss
    yield Finding(
        "PSS",
        "can be read" if own else "can't be read from /proc",
        bool(own),
        None if own else "use a Linux kernel with /proc/PID/smaps; the CPU can't be measured",
    )


def _torch() -> Finding:
    version, cuda = torch_common.torch_version(), torch_common.cuda_build()
    if version is None:
        return Finding("PyTorch", "not installed")
    if cuda is None:
        return Finding("PyTorch", f"{version}, a CPU build")
    text = (
        f"{version}, built for CUDA {cuda}: on the CPU its libraries take some 500 MiB more than "
        "a CPU build's"
    )
    return Finding("PyTorch", text)


def _compilers() -> Iterator[Finding]:
    for subject, names, user in (
        ("C compiler", ("cc", "gcc", "clang"), "Triton"),
        ("C++ compiler", ("c++", "g++", "clang++"), "PyTorch Inductor on the CPU"),
    ):
        found = [name for name in names if shutil.which(name)]
        fix = f"{user} needs one; on Debian or Ubuntu: apt-get install build-essential"
        yield Finding(subject, ", ".join(found) or "none", bool(found), None if found else fix)


def _headers() -> Finding:
    version = sysconfig.get_python_version()
    there = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    package = f"python{version}-dev"
    fix = f"Triton and Inductor need Python.h; on Debian or Ubuntu: apt-get install {package}"
    return Finding(
        "Python headers",
        f"for Python {version}" if there else "Python.h is missing",
        there,
        None if there else fix,
    )
