"""TensorRT on the layer that PyTorch's exporter writes, built strongly typed.

`tensorrt` where it is installed and there is a GPU for it, `tensorrt_rtx` otherwise: one API. What
neither runs on here is planned: TensorRT-RTX compiles for GPUs that are not there, and its log says
what the engine will take (NVIDIA TensorRT documentation, "How TensorRT Works", memory). Planned is
the engine for an A100, the figure's GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.core.devices import compute_capability
from memladder.core.errors import CacheError
from memladder.core.plan import CompilerPlan
from memladder.core.units import MIB
from memladder.frameworks._shared.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)
from memladder.frameworks._shared.tensorrt_build import RTX, TENSORRT, build, load, logger
from memladder.frameworks._shared.torch_common import installed
from memladder.models import cache, onnx_export, weights

if TYPE_CHECKING:
    import numpy as np

    from memladder.frameworks._rules.question import Answer, Question

_INSTALL = "pip install 'memladder[tensorrt]'"
_EXPORTERS = ("torch", "transformers", "onnx", "onnxscript")
# TensorRT-RTX 1.7: `ComputeCapability`. Hopper (9.0) and data-centre Blackwell (10.0) are missing.
_RTX_RUNS_ON = {(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}

_TARGET = "NVIDIA A100 (compute capability 8.0)"
_TARGET_CAPABILITY = "SM80"
# What the rerun of the paper's scripts logged for TensorRT's process before its engine was loaded
# (`figure11_rerun_a100.json`, bloom_tensorrt_32_1).
_CONTEXT_BYTES = 426 * MIB

_MEMORY = re.compile(r"out of memory|OutOfMemory|bad_alloc", re.IGNORECASE)


class TensorRT(Framework):
    """TensorRT or TensorRT-RTX."""

    title = "TensorRT"
    packages = (
        "tensorrt",
        "tensorrt-rtx",
        "tensorrt-rtx-cu13-bindings",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        *_EXPORTERS,
    )
    variables = ("TRT_*", "TENSORRT_*", "ORT_*", "NV_TENSORRT_*")

    def availability(self, device: str) -> Availability:
        """It runs on the GPUs that the installed one supports; elsewhere TensorRT-RTX plans."""
        name = _module_name(device)
        if name is None:
            return Availability(
                False, None, "tensorrt and tensorrt-rtx are not installed", _INSTALL
            )
        version = _version(name)
        missing = [one for one in _EXPORTERS if importlib.util.find_spec(one) is None]
        if missing:
            reason = f"{', '.join(missing)} not installed: needed to export the layer"
            return Availability(False, version, reason, _INSTALL)
        refusal = _why_not(name, device)
        if refusal is None:
            if not installed("cuda.bindings"):
                return Availability(False, version, "cuda-bindings not installed", _INSTALL)
            return Availability(True, version)
        if name in TENSORRT:
            return Availability(
                False,
                version,
                "TensorRT builds for the GPU that is there; tensorrt-rtx plans without one",
                _INSTALL,
            )
        return Availability(True, version, refusal, plans=True)

    def prepare(self, job: Job) -> None:
        """Weights and graph; the engine too, where it will run: who deploys one ships it built."""
        graph = onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)
        name = _module_name(job.case.device)
        if name is None or _why_not(name, job.case.device) is not None:
            return
        path = _engine_path(graph, name, job.case.device)

        def make(part: Path) -> None:
            with part.open("wb") as file:
                build(load(name), graph, None, file)

        cache.made(path, make)

    def plan(self, job: Job) -> tuple[CompilerPlan, Mapping[str, Setting]]:
        """The real engine for the target, built and thrown away."""
        graph = onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)
        name = _module_name(job.case.device)
        assert name is not None
        trt = load(name)
        built = build(trt, graph, _TARGET_CAPABILITY, None)
        constants = built.constant_bytes - weights.weight_bytes(job.config)
        parts = {
            "weights": built.told["Weights"] - constants,
            "constants": constants,
            "activations": built.told["Activation"] + built.told["Device Persistent"],
            "inputs_and_outputs": built.io_bytes,
        }
        compiler = f"TensorRT-RTX {trt.__version__}"
        settings: dict[str, Setting] = {
            **_settings(),
            "target": _TARGET_CAPABILITY,
            "engine_bytes": built.engine_bytes,
            "assumed_context": "rerun log, A100-80GB, TensorRT's process before its engine",
        }
        return CompilerPlan(_TARGET, compiler, parts, {"cuda_context": _CONTEXT_BYTES}), settings

    def predict(self, question: Question) -> Answer:
        """What its compiler would plan (`_rules/tensorrt.py`)."""
        from memladder.frameworks._rules import tensorrt

        return tensorrt.predict(question)

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of float16 (2^-11), as for ONNX Runtime on the same graph."""
        del device
        return 2e-3

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import TensorRT."""
        return _Session(job, announce)


class _Session(Session):
    """The built engine, with its input and its output as the only other memory."""

    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        from cuda.bindings import runtime

        self._cuda = runtime
        name = _module_name(job.case.device)
        assert name is not None
        self._name, self._trt = name, load(name)

    def context(self) -> None:
        """The device's primary context."""
        self._call("cudaSetDevice", int(self.job.case.device.partition(":")[2]))
        self._stream = self._call("cudaStreamCreate")

    def weights(self) -> None:
        """Load the engine: its weights go to the device."""
        job = self.job
        graph = onnx_export.ensure(job.config, job.cache_dir, job.case.shape, job.seed)
        path = _engine_path(graph, self._name, job.case.device)
        if not cache.is_whole(path):
            raise CacheError(f"{path} is not as it was made; measured again, it is made again")
        plan = path.read_bytes()
        self._runtime = self._trt.Runtime(logger(self._trt))
        with _memory_errors():
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise RuntimeError("TensorRT could not load its own engine; its log says why")

    def compile(self) -> None:
        """The execution context, with the activations; input and output."""
        states = weights.hidden_states(self.job.config, self.job.case.shape, self.job.seed)
        with _memory_errors():
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise RuntimeError("TensorRT could not make an execution context; its log says why")
            places = {name: self._call("cudaMalloc", states.nbytes) for name in _TENSORS}
        for name, place in places.items():
            self._context.set_tensor_address(name, int(place))
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpy", places[_TENSORS[0]], states.ctypes.data, states.nbytes, kind)
        self._place, self._found = places[_TENSORS[1]], states

    def run(self) -> None:
        """One pass on a stream, waited for."""
        with _memory_errors():
            if not self._context.execute_async_v3(int(self._stream)):
                raise RuntimeError("TensorRT could not run the engine; its log says why")
            self._call("cudaStreamSynchronize", self._stream)

    def output(self) -> np.ndarray:
        """The output's bytes, copied to the host."""
        import numpy as np

        found = np.empty_like(self._found)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpy", found.ctypes.data, self._place, found.nbytes, kind)
        return found.astype(np.float32)

    def settings(self) -> Mapping[str, Setting]:
        """How the engine was built."""
        return _settings()

    def categories(self) -> Mapping[str, int]:
        """Bytes of the parameters in a strongly typed network, and the engine's activations."""
        return {
            "weights": weights.weight_bytes(self.job.config),
            "activations": self._engine.device_memory_size_v2,
        }

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(f"{name}: out of device memory", *arguments[:1])
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name}: {error}")
        return values[0] if values else None


_TENSORS = ("hidden_states", "output")


def _settings() -> dict[str, Setting]:
    return {
        "onnx_opset": onnx_export.OPSET,
        "dtype": "float16",
        "network": "strongly typed",
        "max_aux_streams": 0,
        "engine": "built beforehand",
    }


def _module_name(device: str) -> str | None:
    """The module that serves `device`: TensorRT builds for the GPU that it has, so not on a CPU
    where TensorRT-RTX is."""
    rtx, full = (
        next((name for name in names if importlib.util.find_spec(name) is not None), None)
        for names in (RTX, TENSORRT)
    )
    return (rtx or full) if device == "cpu" else (full or rtx)


def _why_not(name: str, device: str) -> str | None:
    """Why it can't run on the device; None if it can."""
    if device == "cpu":
        return "TensorRT runs on NVIDIA GPUs only; it compiles without one"
    if name in TENSORRT:
        return None
    found = compute_capability(device)
    if found is None or found in _RTX_RUNS_ON:
        return None
    return f"TensorRT-RTX does not run on compute capability {found[0]}.{found[1]}"


def _version(name: str) -> str | None:
    for distribution in importlib.metadata.packages_distributions().get(name, ()):
        return importlib.metadata.version(distribution)
    return None


def _engine_path(graph: Path, name: str, device: str) -> Path:
    """An engine is of one graph, one version and one kind of GPU."""
    key = hashlib.sha256(f"{_version(name)} {compute_capability(device)}".encode()).hexdigest()[:8]
    return graph.with_name(f"{graph.stem}-{name}-{key}.engine")


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Failed allocations as OutOfMemoryError; TensorRT tells them by their text only."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not isinstance(error, MemoryError) and not _MEMORY.search(str(error)):
            raise
        raise OutOfMemoryError(str(error)) from None


FRAMEWORK = TensorRT()
