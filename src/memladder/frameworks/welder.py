"""Welder: the engine's compiler alone. fp16, kernels joined by the tile graph, one planned arena.

After Shi et al., "Welder: Scheduling Deep Learning Memory Access via Tile-graph" (OSDI'23). It is
Ladder's pipeline without number formats: the same layer compiled from the same ONNX graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memladder.frameworks._shared.base import Job
from memladder.frameworks.ladder import Ladder

if TYPE_CHECKING:
    import numpy as np


class Welder(Ladder):
    """Fusion alone."""

    def __init__(self) -> None:
        super().__init__("fp16", "fp16")
        self.title = "Welder"

    def reference(self, job: Job) -> np.ndarray | None:
        """The layer itself: nothing is quantised."""
        del job
        return None


FRAMEWORK = Welder()
