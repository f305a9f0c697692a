"""ONNX Runtime on the layer that PyTorch's own exporter writes, fully optimised.

The session never imports torch, and every node runs on the provider that was asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.frameworks._shared.base import (
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

    from memladder.frameworks._rules.question import Answer, Question

_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXPORTERS = ("torch", "transformers", "onnx", "onnxscript")

# CUDA: the arena grows by what is asked for and not by powers of two; the weights go past it, and
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
# CPU: no arena, which keeps every pass's peak and grows again when the memory pattern is known,
# and no memory pattern, one block for all activations: LLaMA 1x4096 peaks at 9.4 GiB with both, at
# 6.6 GiB without the arena, at 6.2 GiB without either. No prepacking: while the session is made, a
# packed copy stands beside each weight (BLOOM: 12.3 GiB with it, 10.8 without).
_CPU_ENTRIES = {"session.disable_prepacking": "1"}

_ASKED = re.compile(r"requested buffer of size (\d+)|Failed to allocate memory of size (\d+)")
_MEMORY = re.compile(r"Failed to allocate memory|out of memory|bad_alloc|BFCArena", re.IGNORECASE)


class OnnxRuntime(Framework):
    """ONNX Runtime, CPU or CUDA provider."""

    title = "ONNXRuntime"
    packages = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "onnx", "onnxscript")
    variables = ("ORT_*", "ONNXRUNTIME_*")

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

    def weight_bytes(self, job: Job) -> int:
        """Two bytes a parameter; four where the provider has no float16 Gemm, norms excepted."""
        held = weights.weight_bytes(job.config)
        if not _widens(_PROVIDERS[job.case.device.partition(":")[0]]):
            return held
        places = weights.entries(job.config, job.seed)
        return held + sum(place.length for name, place in places.items() if "norm" not in name)

    def predict(self, question: Question) -> Answer:
        """Weights, arena, pattern's block (`_rules/onnxruntime.py`)."""
        from memladder.frameworks._rules import onnxruntime

        return onnxruntime.predict(question)

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of float16 (2^-11): three roundings in a row, sums in float32."""
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
        self._device, _, index = job.case.device.partition(":")
        self._index = int(index or 0)
        self._provider = _PROVIDERS[self._device]
        self._provider_options: dict[str, str] = {}
        self._entries = _CPU_ENTRIES
        if self._device == "cuda":
            self._provider_options = {"device_id": str(self._index), **_CUDA_OPTIONS}
            self._entries = _CUDA_ENTRIES

    def context(self) -> None:
        """Load CUDA's libraries and make its context, by placing one number on the device."""
        if self._device == "cpu":
            return
        import numpy as np

        self._ort.preload_dlls()
        one = np.zeros(1, np.float16)
        self._one = self._ort.OrtValue.ortvalue_from_numpy(one, self._device, self._index)

    def weights(self) -> None:
        """Find the graph. ONNX Runtime reads the weights while it makes the session: `compile`."""
        job = self.job
        self._graph = onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)

    def compile(self) -> None:
        """Make the session and bind its input and its output on the device."""
        with _memory_errors():
            self._session = self._ort.InferenceSession(
                self._graph,
                self._session_options(),
                providers=[(self._provider, self._provider_options)],
            )
            self._check_placement()
            states = weights.hidden_states(self.job.config, self.job.case.shape, self.job.seed)
            self._binding = self._session.io_binding()
            self._binding.bind_cpu_input("hidden_states", states)
            self._binding.bind_output("output", self._device, self._index)

    def run(self) -> None:
        """One pass on the bound tensors."""
        with _memory_errors():
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()

    def output(self) -> np.ndarray:
        """The bound output, copied to the host."""
        import numpy as np

        found: np.ndarray = self._binding.copy_outputs_to_cpu()[0].astype(np.float32)
        return found

    def settings(self) -> Mapping[str, Setting]:
        """Providers, session and provider options, and what the matrices are kept as."""
        matrices = "float32" if _widens(self._provider) else "float16"
        return {
            "provider": self._provider,
            "onnx_opset": onnx_export.OPSET,
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "io_binding": True,
            "enable_cpu_mem_arena": self._device != "cpu",
            "enable_mem_pattern": self._device != "cpu",
            "dtype": "float16",
            "matrix_dtype": matrices,
            **self._entries,
            **self._provider_options,
        }

    def categories(self) -> Mapping[str, int]:
        """Bytes of the parameters, by the dtypes that the provider's kernels take: a session has
        no way to tell what it holds."""
        return {"weights": FRAMEWORK.weight_bytes(self.job)}

    def _session_options(self) -> Any:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_cpu_mem_arena = options.enable_mem_pattern = self._device != "cpu"
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for key, value in self._entries.items():
            options.add_session_config_entry(key, value)
        return options

    def _check_placement(self) -> None:
        """Raise RuntimeError if a node landed on another provider than the one asked for."""
        if self._session.get_providers()[0] != self._provider:
            raise RuntimeError(f"{self._provider} could not be loaded")
        strays = {
            f"{node.op_type} on {part.ep_name}"
            for part in self._session.get_provider_graph_assignment_info()
            if part.ep_name != self._provider
            for node in part.get_nodes()
        }
        if strays:
            raise RuntimeError(f"not on {self._provider}: {', '.join(sorted(strays))}")


def _widens(provider: str) -> bool:
    """Whether the provider has no float16 Gemm: the CPU's then keeps float32 matrices."""
    if provider != _PROVIDERS["cpu"]:
        return False
    from onnxruntime.capi import onnxruntime_pybind11_state

    return not any(
        kernel.op_name == "Gemm"
        and kernel.provider == provider
        and "tensor(float16)" in kernel.type_constraints.get("T", ())
        for kernel in onnxruntime_pybind11_state.get_all_opkernel_def()
    )


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Failed allocations as OutOfMemoryError; ONNX Runtime tells them by their text only."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not _MEMORY.search(text):
            raise
        asked = _ASKED.search(text)
        size = next((int(digits) for digits in asked.groups() if digits), None) if asked else None
        raise OutOfMemoryError(text, size) from None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


FRAMEWORK = OnnxRuntime()
