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
from memladder.frameworks.base import OutOfMemoryError

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
