"""ONNX Runtime on the layer that PyTorch's own exporter writes, fully optimised.

The session never imports torch, and every node runs on the provider that was asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.frameworks.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)
from memladder.models import onnx_export, weights

if TYPE_CHECKING:
    import numpy as np

_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
_EXPORTERS = ("torch", "transformers", "onnx", "onnxscript")

# The arena grows by what is asked for and not by powers of two; the weights go past it, and
# convolution workspaces are not sought. There is no CPU fallback: a node that CUDA can't run is
# an error and not a copy to the host.
_CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_use_max_workspace": "0",
}
_CUDA_ENTRIES = {
    "session.use_device_allocator_for_initializers": "1",
    "session.disable_cpu_ep_fallback": "1",
}
_CPU_ENTRIES: dict[str, str] = {}


class OnnxRuntime(Framework):
    """ONNX Runtime, CPU or CUDA provider."""

    title = "ONNXRuntime"
    packages = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "onnx", "onnxscript")

    def availability(self, device: str) -> Availability:
        """CUDA needs the GPU package: both packages install the same module."""
        extra = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
        install = f"pip install 'memladder[{extra}]'"
        version = next(filter(None, map(_version, _DISTRIBUTIONS)), None)
        spec = importlib.util.find_spec("onnxruntime")
        if version is None or spec is None or spec.origin is None:
            return Availability(False, None, "onnxruntime is not installed", install)
        missing = [name for name in _EXPORTERS if _version(name) is None]
        if missing:
            reason = f"{', '.join(missing)} not installed: needed to export the layer"
            return Availability(False, version, reason, install)
        cuda = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
        if device != "cpu" and not cuda.exists():
            reason = "this onnxruntime has no CUDA provider"
            return Availability(False, version, reason, install)
        return Availability(True, version)

    def prepare(self, job: Job) -> None:
        """Weights, and the graph of the case's shape."""
        onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of float16, 2^-11 each: every sum is kept in float32 or better."""
        del device
        return 2e-3

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import ONNX Runtime."""
        return _Session(job, announce)


class _Session(Session):
    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        import onnxruntime

        self._ort = onnxruntime
        self._on_cpu = job.case.device == "cpu"
        self._device, _, index = job.case.device.partition(":")
        self._index = int(index or 0)
        self._held: list[Any] = []

    def context(self) -> None:
        """Load CUDA's libraries and make the context, by placing one number on the device."""
        if self._on_cpu:
            return
        import numpy as np

        self._ort.preload_dlls()
        one = np.zeros(1, np.float16)
        self._held.append(self._ort.OrtValue.ortvalue_from_numpy(one, self._device, self._index))

    def weights(self) -> None:
        """Find the graph; ONNX Runtime reads the weights while it makes the session."""
        job = self.job
        self._graph = onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)

    def compile(self) -> None:
        """Make the session and bind its input and output on the device."""
        provider, options = self._provider()
        with _memory_errors():
            self._session = self._ort.InferenceSession(
                self._graph, self._session_options(), providers=[(provider, options)]
            )
            self._session.disable_fallback()
            self._check_placement(provider)
            states = weights.hidden_states(self.job.config, self.job.case.shape, self.job.seed)
            self._binding = self._session.io_binding()
            self._binding.bind_cpu_input("hidden_states", states)
            self._binding.bind_output("output", self._device, self._index)

    def run(self) -> None:
        """One pass on the bound tensors."""
        with _memory_errors():
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
