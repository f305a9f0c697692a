"""Two ledgers side by side: what changed, the largest first, in words that can be pasted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memladder.accounting import split
from memladder.core.ledger import CATEGORIES
from memladder.core.record import Record
from memladder.core.units import MIB

# Smaller changes are the driver's pages, and not named.
_LEAST = 2 * MIB
_CUBLAS_KERNELS = 40 * MIB


@dataclass(frozen=True)
class Change:
    """Bytes of one category in both, and why they differ where that is known."""

    category: str
    before: int
    after: int
    why: str | None = None

    @property
    def nbytes(self) -> int:
        """What came in; below 0 what went."""
        return self.after - self.before

    def __str__(self) -> str:
        amount = f"{self.nbytes / MIB:+,.0f} MiB {self.category}"
        return f"{amount}: {self.why}" if self.why else amount


@dataclass(frozen=True)
class Difference:
    """All changes, and what the two cases were told differently."""

    before: str
    after: str
    total: Change
    changes: tuple[Change, ...]
    told: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """One line: the changes that are more than a page of the driver's."""
        named = [str(change) for change in self.changes if abs(change.nbytes) >= _LEAST]
        said = "; ".join(named) or "nothing changed by more than 2 MiB"
        return f"{self.total.nbytes / MIB:+,.0f} MiB: {said}"


def diff(before: Record, after: Record) -> Difference:
    """Raises RecordError for a record that was not measured."""
    one, two = split.ledger(before), split.ledger(after)
    changes = [
        Change(name, one.nbytes(name), two.nbytes(name), _why(name, one, two, before, after))
        for name in CATEGORIES
        if one.nbytes(name) or two.nbytes(name)
    ]
    changes.sort(key=lambda change: -abs(change.nbytes))
    total = Change("total", one.total_bytes, two.total_bytes)
    return Difference(
        before.case.id, after.case.id, total, tuple(changes), tuple(_told(before, after))
    )


def _why(name: str, one: Any, two: Any, before: Record, after: Record) -> str | None:
    left, right = one.nbytes(name), two.nbytes(name)
    grown = right - left
    if abs(grown) < _LEAST:
        return None
    came = "came in" if grown > 0 else "went"
    if name == "workspace" and not (left and right):
        return f"cuBLAS {came}"
    if name == "modules" and abs(grown) > _CUBLAS_KERNELS:
        return f"kernels of cuBLAS {came}"
    if name == "activations":
        return _activations(grown, after if grown > 0 else before)
    if name == "allocator_slack":
        return f"the allocator holds {'more' if grown > 0 else 'less'} that is not in use"
    if name == "kv_cache":
        return (
            f"{after.case.shape.cached_tokens:,} tokens after {before.case.shape.cached_tokens:,}"
        )
    return None


def _activations(grown: int, larger: Record) -> str | None:
    """Scores are written out where the change is at least one tensor of them."""
    facts, shape = larger.layer, larger.case.shape
    heads = 0
    if facts is not None:
        found = facts.config.get("n_head") or facts.config.get("num_attention_heads")
        heads = found if isinstance(found, int) else 0
    scores = 2 * shape.batch_size * heads * shape.seq_len * shape.length
    if scores >= _LEAST and abs(grown) >= scores:
        return "scores materialised" if grown > 0 else "scores not materialised any more"
    return f"{shape.tokens:,} tokens a pass" if shape.tokens > 1 else None


def _told(before: Record, after: Record) -> list[str]:
    """What differs in case, settings and versions."""
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("", _case(before), _case(after)),
        ("setting ", before.settings, after.settings),
        ("", before.environment.packages, after.environment.packages),
    ]
    found = []
    for kind, one, two in pairs:
        for name in sorted({*one, *two}):
            if one.get(name) != two.get(name):
                found.append(f"{kind}{name}: {one.get(name, 'none')} -> {two.get(name, 'none')}")
    return found


def _case(record: Record) -> dict[str, Any]:
    case, machine = record.case, record.environment.machine
    return {
        "model": case.model,
        "framework": case.framework,
        "workload": str(case.shape),
        "layers": case.layers,
        "device": machine.device,
    }
