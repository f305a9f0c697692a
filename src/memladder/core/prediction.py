"""A prediction: what a case would take, by the categories of the ledger, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field

from memladder.core.errors import RecordError
from memladder.core.ledger import Ledger

SCHEMA = 1


@dataclass(frozen=True)
class Prediction:
    """Bytes that one process, or the fullest of `ranks`, would hold while it works.

    `low_bytes` to `high_bytes` is where the total is expected in 19 of 20 cases. `notes` say why
    the interval is wide, and what was supposed. `version` is the framework's that the rules are of.
    `parameters` are the model's, in the scope asked for.
    """

    model: str
    framework: str
    batch_size: int
    seq_len: int
    past: int
    layers: int | None
    device: str
    ledger: Ledger
    low_bytes: int
    high_bytes: int
    version: str | None = None
    ranks: int = 1
    notes: tuple[str, ...] = ()
    parameters: int = 0
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"schema {self.schema} is not {SCHEMA}, the one this version reads")
        if not self.low_bytes <= self.total_bytes <= self.high_bytes:
            raise RecordError(
                f"{self.id}: {self.total_bytes} bytes are not within "
                f"{self.low_bytes} to {self.high_bytes}"
            )
        if "residual" in {entry.category for entry in self.ledger.entries}:
            raise RecordError(f"{self.id}: a prediction has no residual")

    @property
    def id(self) -> str:
        """The case's name, as records have it."""
        past = f"_p{self.past}" if self.past else ""
        scope = "_all" if self.layers is None else f"_l{self.layers}" if self.layers > 1 else ""
        return f"{self.model}_{self.framework}_{self.batch_size}_{self.seq_len}{past}{scope}"

    @property
    def total_bytes(self) -> int:
        """All of the ledger."""
        return self.ledger.total_bytes
