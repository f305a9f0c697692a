"""Welder: the engine's compiler alone. fp16, kernels joined by the tile graph, one planned arena.

After Shi et al., "Welder: Scheduling Deep Learning Memory Access via Tile-graph" (OSDI'23). The
layer is compiled from the ONNX file that PyTorch's exporter writes; compiling is done beforehand,
as packing is for Ladder, so that the measured process holds neither the graph nor its reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.frameworks.base import Availability, Job, Session, Setting
from memladder.frameworks.ladder import EngineSession, Ladder
from memladder.frameworks.torch_common import installed

if TYPE_CHECKING:
    import numpy as np

    from memladder.engine.compiler.bundle import Compiled
    from memladder.engine.packed_layer import Weights
    from memladder.engine.program import Program

_EXPORTERS = ("onnx", "onnxscript")


class Welder(Ladder):
    """Ladder's pipeline without number formats: fusion alone."""

    packages = ("torch", "triton", "transformers", "safetensors", "onnx", "onnxscript")

    def __init__(self) -> None:
        super().__init__("fp16", "fp16")
        self.title = "Welder"

    def availability(self, device: str) -> Availability:
        """What Ladder needs, and what exports the layer."""
        found = super().availability(device)
        missing = [name for name in _EXPORTERS if not installed(name)]
        if found.available and missing:
            reason = f"{', '.join(missing)} not installed: needed to export the layer"
            return Availability(False, found.version, reason, "pip install 'memladder[onnx]'")
        return found

    def prepare(self, job: Job) -> None:
        """The layer's ONNX file, the program of the case's shape, and the packed weights."""
        _compiled(job)

    def makes(self, job: Job) -> str:
        """A program is one shape's."""
        return job.case.id

    def reference(self, job: Job) -> np.ndarray | None:
        """The layer itself: nothing is quantised."""
        del job
        return None

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import torch and the engine."""
        return _Session(job, announce, self)


class _Session(EngineSession):
    _found: Compiled

    def load(self) -> Weights:
        """The weights of the compiled layer, mapped."""
        from memladder.engine.compiler import bundle

        self._found = bundle.load(*_compiled(self.job))
        return self._found.weights

    def program(self) -> Program:
        """The compiled program."""
        return self._found.program

    def settings(self) -> Mapping[str, Setting]:
        """As Ladder's, and where the program comes from."""
        from memladder.models import onnx_export

        return {**super().settings(), "compiled_from": "onnx", "onnx_opset": onnx_export.OPSET}


def _compiled(job: Job) -> tuple[Path, Path]:
    from memladder.engine.compiler import cached
    from memladder.engine.compiler.compile import Options

    return cached.ensure(
        job.config, job.cache_dir, job.case.shape, job.seed, Options(engine="welder")
    )


FRAMEWORK = Welder()
