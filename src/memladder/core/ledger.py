"""The ledger: a partition of bytes into categories. It sums to its total, or it can't be built.

A record's steady bytes and a prediction carry one over the same categories, so that they can be
laid side by side. Each entry says how it is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memladder.core.errors import RecordError
from memladder.core.serial import StrEnum

CATEGORIES = (
    "interpreter",
    "libraries",
    "context",
    "modules",
    "weights",
    "scales",
    "embeddings",
    "kv_cache",
    "inputs_outputs",
    "activations",
    "workspace",
    "graphs",
    "heap",
    "allocator",
    "allocator_slack",
    "driver_step",
    "residual",
)
"""In the order in which a process takes them.

`interpreter`, `libraries`, `heap` and `allocator` are of a process on the CPU; `context` (CUDA's),
`modules` (loaded kernels), `graphs` and `driver_step` (the driver hands out 2 MiB) of one on a GPU.
`weights` are the decoder layers' parameters without `scales` (zero points and code books among
them); `embeddings` are the tables, the head and the norms around the layers. `activations` are the
highest that live at once in a pass beside `inputs_outputs`; `allocator_slack` is reserved and not
in use: rounding and fragmentation. A reading that no entry explains is `residual`.
"""


class Known(StrEnum):
    """How the bytes of an entry are known, the best first."""

    TOLD = "told"
    """The framework, or the system, counts them."""
    DERIVED = "derived"
    """They follow from shapes and documented rules."""
    DIFFERENCE = "difference"
    """Between two readings."""
    ASSUMED = "assumed"
    """A constant measured elsewhere."""
    RESIDUAL = "residual"
    """The remainder."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one category. Only what was read or is left may be negative."""

    category: str
    nbytes: int
    known: Known
    note: str | None = None

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise RecordError(
                f"ledger category {self.category!r} is not one of {', '.join(CATEGORIES)}"
            )
        if isinstance(self.nbytes, bool) or not isinstance(self.nbytes, int):
            raise RecordError(f"ledger: {self.category} of {self.nbytes!r} is no whole number")
        if (self.category == "residual") != (self.known is Known.RESIDUAL):
            raise RecordError(f"ledger: {self.category} can't be known as {self.known}")
        if self.nbytes < 0 and self.known not in (Known.DIFFERENCE, Known.RESIDUAL):
            raise RecordError(f"ledger: {self.category} of {self.nbytes} bytes is below 0")


@dataclass(frozen=True)
class Ledger:
    """Entries that sum to `total_bytes`, each category at most once.

    >>> ledger = closing(100, [Entry("weights", 90, Known.TOLD)])
    >>> ledger.nbytes("weights"), ledger.nbytes("residual"), ledger.total_bytes
    (90, 10, 100)
    """

    total_bytes: int
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        names = [entry.category for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecordError(f"ledger: {', '.join(twice)} is there more than once")
        held = sum(entry.nbytes for entry in self.entries)
        if held != self.total_bytes:
            raise RecordError(f"ledger: entries of {held} bytes where {self.total_bytes} are held")

    def get(self, category: str) -> Entry | None:
        """The entry of a category; None where there is none."""
        return next((entry for entry in self.entries if entry.category == category), None)

    def nbytes(self, category: str) -> int:
        """Bytes of a category, 0 where it has no entry."""
        found = self.get(category)
        return found.nbytes if found else 0


def summed(entries: Iterable[Entry]) -> Ledger:
    """The ledger of these entries, in the order of CATEGORIES; empty ones are left out."""
    kept = [entry for entry in entries if entry.nbytes]
    kept.sort(key=lambda entry: CATEGORIES.index(entry.category))
    return Ledger(sum(entry.nbytes for entry in kept), tuple(kept))


def closing(total_bytes: int, entries: Iterable[Entry], note: str | None = None) -> Ledger:
    """The ledger of a reading: what the entries do not explain becomes `residual`.

    `residual` is always there, also where it is 0: it was looked for.
    """
    ledger = summed(entries)
    left = Entry("residual", total_bytes - ledger.total_bytes, Known.RESIDUAL, note)
    return Ledger(total_bytes, (*ledger.entries, left))
