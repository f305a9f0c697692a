"""torch's failed allocations, told by their text: it has an exception of its own on CUDA only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from memladder.frameworks.base import OutOfMemoryError
from memladder.units import GIB, KIB, MIB

_UNITS = {"bytes": 1, "kib": KIB, "mib": MIB, "gib": GIB}
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Failed allocations as OutOfMemoryError, with the bytes asked for where the text has them."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not _MEMORY.search(text):
            raise
        asked = _ASKED.search(text)
        size = round(float(asked[1]) * _UNITS[asked[2].lower()]) if asked else None
        raise OutOfMemoryError(text.splitlines()[0] if text else "out of memory", size) from None
