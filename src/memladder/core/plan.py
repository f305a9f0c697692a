"""What a compiler says that its result would take, on a device where it did not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CompilerPlan:
    """What a compiler's own result will take on `target`, where it did not run.

    `parts` are bytes that the compiler tells, or that follow from shapes; `assumed` are bytes that
    it can't know, such as the target's CUDA context.
    """

    target: str
    compiler: str
    parts: Mapping[str, int]
    assumed: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.parts.values()) + sum(self.assumed.values())
