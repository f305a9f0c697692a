"""What a prediction is asked of a framework, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from memladder.core.errors import UnavailableError
from memladder.core.ledger import Entry
from memladder.core.units import MIB
from memladder.models.architecture import Architecture, LayerGroup


class UnpredictableError(UnavailableError):
    """The rules have no answer, and say why."""


@dataclass(frozen=True)
class Device:
    """Where it would run: `cpu`, or a GPU with its context and what processes can have of it."""

    name: str
    usable_bytes: int
    context_bytes: int
    context_measured: bool
    capability: tuple[int, int] | None
    is_cpu: bool = False


@dataclass(frozen=True)
class Question:
    """A case without a machine: an architecture, a workload, a scope, a device.

    `layers` is 1 for one decoder layer alone, of the group that is most frequent; a larger number
    for so many of the model's, tables, last norm and head around them; None for all of it.
    `settings` are the framework's own, and `version` its version where that changes the rules.
    `cache_format` is the format of keys and values (`auto`: as activations).
    """

    model: Architecture
    batch_size: int
    seq_len: int
    past: int
    layers: int | None
    device: Device
    ranks: int = 1
    cache_format: str = "auto"
    version: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Rows of a pass."""
        return self.batch_size * self.seq_len

    @property
    def length(self) -> int:
        """Tokens a sequence has after the pass."""
        return self.past + self.seq_len

    @property
    def whole(self) -> bool:
        """Is it a model, of all or some of its layers, and not a layer alone?"""
        return self.layers != 1

    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers in scope."""
        if self.layers is None:
            return self.model.groups
        if self.layers == 1:
            usual = max(self.model.groups, key=lambda group: group.count)
            return (LayerGroup(usual.numbers[:1], usual.layer),)
        first = [
            LayerGroup(tuple(n for n in group.numbers if n < self.layers), group.layer)
            for group in self.model.groups
        ]
        return tuple(group for group in first if group.numbers)

    def require_capability(self, least: tuple[int, int], who: str) -> None:
        """Raise UnpredictableError for a GPU that is known to be older."""
        found = self.device.capability
        if found is not None and found < least:
            raise UnpredictableError(f"{who} needs compute capability {least[0]}.{least[1]}")

    def number(self, name: str, default: int) -> int:
        """A whole number among the settings."""
        text = self.settings.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdecimal() and len(text) <= 12):
            raise UnpredictableError(f"setting {name} {text[:40]!r} is not a whole number")
        return int(text)

    def fraction(self, name: str, default: float) -> float:
        """A number above 0, and at most 1, among the settings."""
        text = self.settings.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise UnpredictableError(f"setting {name} {text!r} is not above 0 and at most 1")
        return value


@dataclass(frozen=True)
class Answer:
    """Entries of a ledger; how far the total may be off, and why it is more than usual.

    `spread` is of all that is neither weights nor cache; `spread_bytes` is added to it.
    """

    entries: tuple[Entry, ...]
    spread: float = 0.02
    spread_bytes: int = 4 * MIB
    notes: tuple[str, ...] = ()
    version: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
