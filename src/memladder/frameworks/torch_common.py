"""What the frameworks that stand on torch, or ask for a kind of GPU, share."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memladder.core.units import GIB, KIB, MIB
from memladder.frameworks.base import OutOfMemoryError

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
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    values = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cuda: str | None = values.get("cuda")
    return cuda


def installed(name: str) -> bool:
    """Whether a module, which may be inside a package, can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # The package around it is missing.
        return False
