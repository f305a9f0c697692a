"""The table of GPUs: memory, what of it processes can have, bandwidth; each with its source."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from memladder.core.errors import UsageError
from memladder.core.units import GIB, MIB, format_bytes

# A context with default stacks on sm_90; other GPUs' were not measured.
_CONTEXT_MIB = 518
_SIZES = {"mib": MIB, "gib": GIB, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(mib|gib|mb|gb)\s*", re.IGNORECASE)
_COUNT = re.compile(r"\s*(\d{1,3})\s*[x×]\s*(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `memory_bytes` is the driver's total, `usable_bytes` what processes share.

    `context_measured` is false where the context's size is an H100's.
    """

    name: str
    memory_bytes: int
    usable_bytes: int
    bandwidth: int
    context_bytes: int
    context_measured: bool
    capability: tuple[int, int] | None = None
    source: str = ""


@cache
def table() -> tuple[Gpu, ...]:
    """All GPUs that are known."""
    return tuple(gpu for gpu, _ in _rows())


@cache
def _rows() -> tuple[tuple[Gpu, tuple[str, ...]], ...]:
    text = resources.files(__package__).joinpath("gpus.json").read_text("utf-8")
    rows = []
    for row in json.loads(text)["gpus"]:
        major, minor = row["capability"].split(".")
        measured = row.get("context_mib")
        gpu = Gpu(
            name=row["name"],
            memory_bytes=row["memory_mib"] * MIB,
            usable_bytes=round(row["usable_gib"] * GIB),
            bandwidth=row["gbps"] * 10**9,
            context_bytes=(measured or _CONTEXT_MIB) * MIB,
            context_measured=measured is not None,
            capability=(int(major), int(minor)),
            source=row["sources"]["memory"],
        )
        rows.append((gpu, (row["name"], *row["aliases"])))
    return tuple(rows)


def find(text: str) -> Gpu:
    """The GPU of that name, however it is written. Raises UsageError with the nearest names."""
    wanted = _plain(text)
    for gpu, names in _rows():
        if wanted in map(_plain, names):
            return gpu
    plain = {_plain(name): gpu.name for gpu, many in _rows() for name in many}
    close = difflib.get_close_matches(wanted, plain, n=3, cutoff=0.4)
    nearest = ", ".join(dict.fromkeys(plain[name] for name in close))
    known = ", ".join(gpu.name for gpu in table())
    said = f"the nearest are {nearest}" if nearest else f"known: {known}"
    raise UsageError(f"unknown GPU {text[:40]!r}; {said}; or give what is free, as --free 18GiB")


def find_counted(text: str) -> tuple[Gpu, int]:
    """As `find`, with how many of them: `8xH100`."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return find(text), 1
    count = int(match[1])
    if not 1 <= count <= 128:
        raise UsageError(f"GPU {text[:40]!r}: {count} is not from 1 to 128")
    return find(match[2]), count


def of_size(text: str) -> Gpu:
    """A GPU of which only the free memory is known: `18GiB`. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    size = round(float(match[1]) * _SIZES[match[2].lower()]) if match else 0
    if not 0 < size < 1 << 50:
        raise UsageError(f"free memory {text[:40]!r} is not a size such as 18GiB or 24000MiB")
    return Gpu(
        f"{format_bytes(size)} free", size, size, 0, _CONTEXT_MIB * MIB, False, source="given"
    )


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "sxm5", "tesla"))
