"""What the frameworks that stand on torch, or ask for a kind of GPU, share."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memladder.core.units import GIB, KIB, MIB
from memladder.frameworks._shared.base import OutOfMemoryError

TORCH_VARIABLES = ("PYTORCH_*", "TORCH_*", "TORCHINDUCTOR_*", "TORCHDYNAMO_*", "TRITON_*", "ATEN_*")
"""What torch and Triton read from the environment: `Framework.variables`."""

_UNITS = {"bytes": 1, "kib": KIB, "mib": MIB, "gib": GIB}
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Failed allocations as OutOfMemoryError, with the bytes asked for where the text has them.

    They are told by their text: torch has an exception of its own on CUDA only.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not _MEMORY.search(text):
            raise
        asked = _ASKED.search(text)
        size = round(float(asked[1]) * _UNITS[asked[2].lower()]) if asked else None
        raise OutOfMemoryError(text.splitlines()[0] if text else "out of memory", size) from None


def cuda_build() -> str | None:
    """The CUDA version that torch was built with, without torch's import; None for a CPU build."""
    cuda: str | None = _torch_facts().get("cuda")
    return cuda


def torch_version() -> str | None:
    """torch's version as it tells it itself, with what it was built for: `2.13.0+cpu`,
    `2.11.0+cu130`. Without its import; None where it is not installed."""
    facts = _torch_facts()
    version: str | None = facts.get("__version__")
    cuda: str | None = facts.get("cuda")
    if version is None or cuda is None or "+" in version:
        return version
    return f"{version}+cu{cuda.replace('.', '')}"


def _torch_facts() -> dict[str, Any]:
    """What torch's version file says; empty where there is none."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(file)) if file and file.is_file() else {}


def installed(name: str) -> bool:
    """Whether a module, which may be inside a package, can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # The package around it is missing.
        return False


class AllocatorReadings:
    """What CUDA's caching allocator says of itself; its peak while steady apart from the rest's."""

    def __init__(self) -> None:
        self._before: dict[str, int] | None = None

    def begin_steady(self) -> None:
        """Keep the peaks so far, and let new ones begin."""
        import torch

        stats = torch.cuda.memory_stats()
        self._before = {name: stats[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved")}
        torch.cuda.reset_peak_memory_stats()

    def categories(self) -> dict[str, int]:
        """Bytes by the names that records have. `allocator_steady_peak` is the highest in use since
        `begin_steady`; requested and inactive are what rounding and splitting cost."""
        import torch

        stats = torch.cuda.memory_stats()
        found = {
            "allocator_requested": stats.get("requested_bytes.all.current", 0),
            "allocator_inactive": stats.get("inactive_split_bytes.all.current", 0),
        }
        for name in ("allocated", "reserved"):
            peak = stats[f"{name}_bytes.all.peak"]
            found[f"allocator_{name}"] = stats[f"{name}_bytes.all.current"]
            found[f"allocator_{name}_peak"] = max(peak, (self._before or {}).get(name, 0))
        if self._before is not None:
            found["allocator_steady_peak"] = stats["allocated_bytes.all.peak"]
        return found
