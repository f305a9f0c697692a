"""The environment of a record: machine, driver, packages, the variables that matter. No names of
hosts or users, and no framework is imported to learn it."""

from __future__ import annotations

import fnmatch
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from memladder import __version__
from memladder.core import children, devices
from memladder.core.case import Case
from memladder.core.errors import DeviceError
from memladder.core.host import HostMemory
from memladder.core.record import Environment, Machine
from memladder.core.text import clean
from memladder.environments import ask, interpreter
from memladder.frameworks._shared.base import Framework

# What changes any process: how it allocates, how many threads it has, what CUDA does. The variables
# of a framework are declared in its own file (`Framework.variables`).
_VARIABLES = re.compile(
    r"CUDA_(?!HOME$|PATH$|ROOT$|ROOT_DIR$|INC_PATH$)\w+|CUBLAS\w*|CUDNN_\w+|CUFFT_\w+"
    r"|NVIDIA_TF32_OVERRIDE|OMP_\w+|GOMP_\w+|KMP_\w+|MKL_\w+|OPENBLAS_\w+|DNNL_\w+|ONEDNN_\w+"
    r"|\w*MALLOC_\w+|PYTHONMALLOC|GLIBC_TUNABLES|LD_PRELOAD"
)
# A secret is no part of a record, not even that it is set; container images name their versions.
_LEFT_OUT = re.compile(
    r"(^|_)(KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|CREDENTIALS?|AUTH)(_|$)|_VERSION$"
)
# Where a service listens says nothing about memory, and much about a user; and so does a folder.
_ADDRESS = re.compile(r"(^|_)(HOST|IP|URL|URI|ADDR|ADDRESS|ENDPOINT|SERVER|PORT|USER)(_|$)|://")
_PATH = re.compile(r"(^|[:=,\s])(~|\.{0,2}/)")
_LIBRARY = re.compile(r"[^/:=,\s]+\.so[.\d]*(?=[:=,\s]|$)")

_COMMIT = re.compile(r"[0-9a-f]{7,40}(\+dirty)?")

RUNNER_VARIABLES = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""What the runner sets for every worker: CUDA shall number GPUs as NVML does."""


def describe(case: Case, framework: Framework | None) -> Environment:
    """The environment in which `case` runs here. Raises DeviceError where its device is missing."""
    runners = RUNNER_VARIABLES if case.device != "cpu" else {}
    own = framework.environment(case) if framework else {}
    python = platform.python_version()
    packages: Mapping[str, str] = {}
    if framework is not None:
        python, packages = ask.versions(case.framework, framework, case.device)
    return Environment(
        machine=machine(case.device),
        python=python,
        packages=packages,
        variables=variables(
            {**os.environ, **runners, **own},
            case.device,
            framework.variables if framework else (),
        ),
        commit=commit(),
        memladder=__version__,
        interpreter=interpreter.chosen(case.framework).label,
    )


def resolve_device(name: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` to `cpu` or `cuda:N`.

    `auto` is the first visible GPU, or `cpu` where there is none. Raises DeviceError.
    """
    if name == "auto":
        try:
            return "cuda:0" if devices.visible_devices() else "cpu"
        except DeviceError:
            return "cpu"
    wanted = "cuda:0" if name == "cuda" else name
    number = wanted.removeprefix("cuda:")
    if wanted != "cpu" and (number == wanted or not number.isdecimal()):
        raise DeviceError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    try:
        devices.device(wanted)
    except DeviceError as error:
        raise DeviceError(f"device {name!r} can't be used: {error}; cpu always can") from None
    return wanted if wanted == "cpu" else f"cuda:{int(number)}"


def machine(device: str) -> Machine:
    """This machine, with `device` as its subject. Raises DeviceError."""
    memory = HostMemory().total_bytes
    gpu = devices.device(device)
    cpu = cpu_name()
    return Machine(
        device=gpu.name if gpu else cpu,
        device_memory_bytes=gpu.memory_bytes if gpu else memory,
        driver=devices.nvml().driver if gpu else None,
        cuda=devices.nvml().cuda if gpu else None,
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        os=_os_name(),
        kernel=platform.release(),
    )


def variables(
    environ: Mapping[str, str], device: str, patterns: Sequence[str] = ()
) -> dict[str, str]:
    """The variables that matter, sorted: any process's, and a framework's own, whose
    `patterns` are a shell's. Of a value that names a folder only libraries are kept, of an address
    that it is set, of a secret nothing."""
    found = {
        clean(name): _told(name, value)
        for name, value in environ.items()
        if not _LEFT_OUT.search(name)
        and (
            _VARIABLES.fullmatch(name)
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )
    }
    if device != "cpu":
        # LAZY since CUDA 11.7 on Linux; EAGER loads every kernel of a library with its first one.
        found.setdefault("CUDA_MODULE_LOADING", "LAZY (default)")
    return dict(sorted(found.items()))


def _told(name: str, value: str) -> str:
    if _ADDRESS.search(name) or _ADDRESS.search(value):
        return "(an address)"
    if _PATH.search(value):
        return " ".join(["(a path)", *_LIBRARY.findall(clean(value))])
    return clean(value)


@cache
def commit() -> str | None:
    """The commit of the work tree that memladder runs from, `+dirty` if tracked files differ from
    it. Where there is no work tree (a package, a container image), what MEMLADDER_COMMIT says."""
    folder = Path(__file__).resolve().parents[3]
    if (folder / ".git").exists() and (folder / "pyproject.toml").is_file():
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        if head is not None and changes is not None:
            return f"{head.strip()}+dirty" if changes.strip() else head.strip()
    told = os.environ.get("MEMLADDER_COMMIT", "")
    return told if _COMMIT.fullmatch(told) else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = children.run(["git", "-C", str(folder), *arguments], timeout_s=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's model, or the architecture where the kernel does not tell it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.machine()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
