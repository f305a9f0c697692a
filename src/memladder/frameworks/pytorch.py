"""PyTorch: the layer compiled by Inductor as one graph of static shapes, without autograd."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.core.case import Case
from memladder.core.files import own_folder
from memladder.frameworks._shared.base import Availability, Framework, Job, Session, Setting
from memladder.frameworks._shared.torch_common import (
    TORCH_VARIABLES,
    AllocatorReadings,
    cuda_build,
    memory_errors,
)
from memladder.models import weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    from memladder.frameworks._rules.question import Answer, Question
    from memladder.models.layer import Block

_INSTALL = "pip install 'memladder[pytorch]'"
_NEEDED = ("torch", "transformers", "safetensors")
_TOLERANCE = {"cpu": 1.6e-2, "cuda": 2e-3}


class PyTorch(Framework):
    """torch.compile with Inductor, CPU or CUDA."""

    title = "PyTorch-Inductor"
    wholes = pasts = any_family = True
    packages: tuple[str, ...] = ("torch", "triton", "transformers", "safetensors")
    variables: tuple[str, ...] = TORCH_VARIABLES

    def availability(self, device: str) -> Availability:
        """CUDA needs a CUDA build, which torch's version file names without torch's import."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", _INSTALL)
        version = importlib.metadata.version("torch")
        if device != "cpu" and cuda_build() is None:
            return Availability(False, version, f"torch {version} is built without CUDA", _INSTALL)
        compilers = ("c++", "g++", "clang++") if device == "cpu" else ("cc", "gcc", "clang")
        if not any(map(shutil.which, compilers)):
            reason = f"Inductor needs a compiler, and none of {', '.join(compilers)} is on the PATH"
            return Availability(False, version, reason, "apt-get install g++")
        return Availability(True, version)

    def environment(self, case: Case) -> Mapping[str, str]:
        """`inductor_environment`."""
        return inductor_environment(case)

    def prepare(self, job: Job) -> None:
        """Weights, and the past."""
        if job.model is not None:
            from memladder.frameworks._shared.torch_whole import source

            source(job).prepare(job.case.shape)
            return
        weights.ensure(job.config, job.cache_dir, job.seed)
        if job.case.shape.past:
            from memladder.models import past

            past.ensure(job.config, job.cache_dir, job.case.shape.past, job.seed)

    def makes(self, job: Job) -> str:
        """The same for all shapes of one past."""
        return f"{job.digest} {job.case.layers} {job.case.shape.past} weights"

    def predict(self, question: Question) -> Answer:
        """The load and the passes, replayed (`_rules/torch_layer.py`)."""
        from memladder.frameworks._rules import torch_layer

        return torch_layer.predict(question, torch_layer.PLAIN)

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of the dtype: 2^-11 in float16, 2^-8 in bfloat16, the CPU's worst.

        A layer rounds its activations a few times in a row and adds in float32.
        """
        return _TOLERANCE[device.partition(":")[0]]

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import torch and the layer's module."""
        if job.model is not None:
            from memladder.frameworks._shared.torch_whole import WholeSession

            return WholeSession(job, announce)
        return InductorSession(job, announce)


def inductor_environment(case: Case) -> Mapping[str, str]:
    """No compiled code from earlier runs, and on CUDA no compiling pool and a tight allocator.

    Every run compiles anew: a cached kernel would spare the second repeat what the first one
    needed. On the CPU a thread a core waits for the C++ compiler. torch 2.9 renamed
    PYTORCH_CUDA_ALLOC_CONF; both names are set.
    """
    common = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if case.device == "cpu":
        return common | {"TORCHINDUCTOR_COMPILE_THREADS": str(len(os.sched_getaffinity(0)))}
    return common | {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


class InductorSession(Session):
    """A layer of torch modules, compiled as one graph of static shapes."""

    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        # Compiled code goes where all made files go, unless the user has said otherwise.
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        for name, folder in folders.items():
            os.environ.setdefault(name, str(own_folder(job.cache_dir / folder)))
        import torch

        from memladder.models import capture, layer

        capture.import_family(job.config.model)
        self._torch = torch
        self._load = layer.load
        self._set_length = capture.set_length
        self._device = torch.device(job.case.device)
        self._dtype, self._dtype_reason = self.dtype()
        self._readings = AllocatorReadings()

    def dtype(self) -> tuple[torch.dtype, str]:
        """What the layer computes in, and why."""
        return layer_dtype(self._device)

    def place(self, path: Path) -> Block:
        """The layer of a weights' file, on the device."""
        return self._load(self.job.config, path, self.job.case.shape, self._dtype, self._device)

    def context(self) -> None:
        """Bring CUDA up and choose the device."""
        if self._device.type == "cuda":
            self._torch.cuda.set_device(self._device)
            self._torch.cuda.synchronize(self._device)

    def weights(self) -> None:
        """The layer on the device, and its hidden states."""
        job = self.job
        path = weights.ensure(job.config, job.cache_dir, job.seed)
        with memory_errors():
            self._layer = self.place(path)
            self._attention = self._layer.attention
            self.remember()
            states = self._torch.from_numpy(
                weights.hidden_states(job.config, job.case.shape, job.seed)
            )
            self._states = states.to(device=self._device, dtype=self._dtype)

    def compile(self) -> None:
        """Compile, inside the first pass, and let go of what only compiling needed."""
        from torch._dynamo.backends.registry import lookup_backend
        from torch._inductor.async_compile import shutdown_compile_workers

        inductor = lookup_backend("inductor")

        def backend(graph: Any, inputs: Any) -> Any:
            compiled = inductor(graph, inputs)
            gc.collect()
            self.announce("first run")
            return compiled

        # One process may compile many layers, and Dynamo refuses too many for one piece of code.
        self._torch._dynamo.reset()
        self._compiled = self._torch.compile(
            self._layer, backend=backend, fullgraph=True, dynamic=False
        )
        self.run()
        # Where Triton is installed, Inductor keeps a pool of compiling processes, idle from now on.
        shutdown_compile_workers()
        gc.collect()
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()

    def run(self) -> None:
        """One pass in inference mode, synchronised."""
        with memory_errors(), self._torch.inference_mode():
            # The last pass's output must not live beside the next one's.
            self._output = None
            self._output = self.passed()
            if self._device.type == "cuda":
                self._torch.cuda.synchronize(self._device)

    def passed(self) -> torch.Tensor:
        """The output of one pass over the past."""
        if self._layer.kept is not None:
            self._set_length(self._layer.kept, self.job.case.shape.past)
        found: torch.Tensor = self._compiled(self._states)
        return found

    def remember(self) -> None:
        """Put the past into the cache, if there is one."""
        job = self.job
        if job.case.shape.past:
            from memladder.models import past

            held = past.ensure(job.config, job.cache_dir, job.case.shape.past, job.seed)
            past.fill(held, self._layer.kept, job.case.shape.past)

    def output(self) -> np.ndarray:
        """A pass's output, on the host. With a past it is a pass of its own: a window that is full
        has moved on with each pass before."""
        if self.job.case.shape.past:
            self.remember()
            self.run()
        assert self._output is not None
        found: np.ndarray = self._output.float().cpu().numpy()
        return found

    def settings(self) -> Mapping[str, Setting]:
        """How the layer is compiled, and in what dtype it computes."""
        return {
            "backend": "inductor",
            "fullgraph": True,
            "dynamic": False,
            "inference_mode": True,
            "attention": self._attention,
            "dtype": str(self._dtype).removeprefix("torch."),
            "dtype_reason": self._dtype_reason,
            "empty_cache_after_first_run": self._device.type == "cuda",
            "threads": self._torch.get_num_threads(),
            **inductor_environment(self.job.case),
        }

    def categories(self) -> Mapping[str, int]:
        """Parameters and other inputs; on CUDA what the caching allocator hands out and holds."""
        found = {
            **self.held(),
            "buffers": sum(tensor.nbytes for tensor in self._layer.buffers(recurse=False)),
        }
        if self._layer.kept is not None:
            found["kv_cache"] = self._layer.kept.keys.nbytes + self._layer.kept.values.nbytes
        return {**found, **self.allocated()}

    def allocated(self) -> Mapping[str, int]:
        """What CUDA's caching allocator hands out and holds."""
        return self._readings.categories() if self._device.type == "cuda" else {}

    def begin_steady(self) -> None:
        """On CUDA the allocator's peaks begin anew."""
        if self._device.type == "cuda":
            self._readings.begin_steady()

    def held(self) -> Mapping[str, int]:
        """Bytes of the parameters, as `weights`."""
        return {"weights": sum(parameter.nbytes for parameter in self._layer.parameters())}


def layer_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """float16 wherever its matrix products are compiled in; bfloat16 takes two bytes as well.

    On a CPU without float16 instructions oneDNN has no float16 kernels, and PyTorch's own are ten
    times slower than the bfloat16 ones of the same machine.
    """
    import torch

    if device.type != "cpu":
        return torch.float16, "the figure's dtype"
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float16, "oneDNN has float16 kernels for this CPU"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "oneDNN has bfloat16 but no float16 kernels for this CPU"
    return torch.float16, "oneDNN has no 16-bit kernels for this CPU"


FRAMEWORK = PyTorch()
