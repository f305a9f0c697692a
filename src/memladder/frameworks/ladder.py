"""Ladder: memladder's own engine. Weights in a number format, one planned arena.

A variant's name reads activation, then weight: `ladder_int8_int1` has int8 activations and int1
weights; `ladder` alone is fp16. The figure has six. A weight format that the figure lacks is a
variant with fp16 activations.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from memladder import formats
from memladder.core.case import Case
from memladder.core.devices import compute_capability
from memladder.core.files import own_folder
from memladder.frameworks._shared.base import Availability, Framework, Job, Session, Setting
from memladder.frameworks._shared.torch_common import (
    TORCH_VARIABLES,
    cuda_build,
    installed,
    memory_errors,
)
from memladder.models.weights import fill_hidden_states, hidden_states

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from memladder.engine.packed.packed_layer import PackedLayer
    from memladder.engine.packed.packing import Rows
    from memladder.formats._shared.base import Format
    from memladder.frameworks._rules.question import Answer, Question

_INSTALL = {
    "cpu": "pip install 'memladder[ladder]'",
    "cuda": "pip install 'memladder[ladder-cuda]'",
}
# onnx and onnxscript export the layer that is compiled.
_NEEDED = ("torch", "transformers", "safetensors", "onnx", "onnxscript")
_NEEDED_ON_CUDA = ("triton", "cuda.bindings")
# Compute capabilities: asynchronous copies into shared memory, and fp8 arithmetic.
_LEAST = (8, 0)
_LEAST_FP8 = (8, 9)
# ‖y − ref‖ / ‖ref‖ on CUDA where activations are quantised: rounding to 8 bits is a step function,
# and sums in another order move some values over a step.
_STEPS = 1e-2
# A layer's output has lost 0.7 to 1.4 times what its weights and activations have, of all of its
# formats, models and shapes. Wrong weights lose 1.1 times the output itself: the residual stays.
_PROPAGATED = 1.6
# Tokens of which it is told what quantising them loses.
_SAMPLE = 512


class Ladder(Framework):
    """The engine with one format for activations and one for weights."""

    packages = ("torch", "triton", "transformers", "safetensors", "onnx", "onnxscript")
    variables = TORCH_VARIABLES
    rounds_as_layer = False

    def __init__(self, activation: str, weight: str) -> None:
        self.activation = activation
        self.weight = weight
        plain = (activation, weight) == ("fp16", "fp16")
        formats_told = "" if plain else f"-W_{weight.upper()} A_{activation.upper()}"
        self.title = f"Ladder{formats_told}"

    def availability(self, device: str) -> Availability:
        """On CUDA it needs a CUDA build of torch, Triton, and a GPU that has what it uses."""
        needed = _NEEDED if device == "cpu" else _NEEDED + _NEEDED_ON_CUDA
        install = _INSTALL[device.partition(":")[0]]
        missing = [name for name in needed if not installed(name)]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", install)
        version = importlib.metadata.version("torch")
        if device == "cpu":
            return Availability(True, version)
        if cuda_build() is None:
            return Availability(False, version, f"torch {version} is built without CUDA", install)
        reason = self._too_old(device)
        return Availability(reason is None, version, reason)

    def _least(self) -> tuple[int, int]:
        return _LEAST_FP8 if "fp8" in self.weight else _LEAST

    def _too_old(self, device: str) -> str | None:
        found = compute_capability(device)
        least = self._least()
        if found is None or found >= least:
            return None
        return (
            f"{self.title} needs compute capability {least[0]}.{least[1]}; "
            f"{device} has {found[0]}.{found[1]}"
        )

    def environment(self, case: Case) -> Mapping[str, str]:
        """On CUDA: kernels are loaded when they are used, and allocations are the driver's own.

        PyTorch's caching allocator takes 20 MiB for a block of 1 to 10 MiB.
        """
        if case.device == "cpu":
            return {}
        return {"CUDA_MODULE_LOADING": "LAZY", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def prepare(self, job: Job) -> None:
        """The packed layer, and before it the layer compiled from ONNX, for all shapes."""
        from memladder.engine.compile import layers

        layers.ensure_packed(job.config, formats.get(self.weight), job.cache_dir, job.seed)

    def makes(self, job: Job) -> str:
        """The same for all shapes."""
        return f"{job.config.digest} {self.weight}"

    def weight_bytes(self, job: Job) -> int:
        """All tensors of the packed layer."""
        from memladder.engine.compile import layers
        from memladder.engine.packed.packed_layer import Form

        fused = layers.ensure(job.config, job.cache_dir).fused
        return Form(fused, formats.get(self.weight), {}).nbytes

    def reference(self, job: Job) -> np.ndarray | None:
        """The layer in fp32 on the dequantised weights, activations rounded alike."""
        from memladder.engine.compile import layers
        from memladder.engine.packed import packed_layer, reference

        path = layers.ensure_packed(job.config, formats.get(self.weight), job.cache_dir, job.seed)
        return reference.output(
            job.config,
            packed_layer.load(path),
            layers.ensure(job.config, job.cache_dir).sources,
            job.case.shape,
            job.seed,
            self.activation_format(),
        )

    def predict(self, question: Question) -> Answer:
        """Packed weights and the plan of the arena, in closed form (`_rules/ladder.py`)."""
        from memladder.frameworks._rules import ladder, stored

        if not question.device.is_cpu:
            question.require_capability(self._least(), self.title)
        return ladder.predict(question, stored.scheme(self.weight), self.activation)

    def quantisation_tolerance(self, job: Job) -> float:
        """What quantising these weights and hidden states loses by itself, `_PROPAGATED` times, and
        the plain bound. In fp16 nothing is lost."""
        from memladder.engine.compile import layers
        from memladder.engine.packed import packing

        weight = packing.weight_loss(
            layers.ensure(job.config, job.cache_dir), formats.get(self.weight), self._source(job)
        )
        given = packing.loss(formats.get(self.activation), self._states(job))
        return self.tolerance(job.case.device) + _PROPAGATED * math.hypot(weight, given)

    @staticmethod
    def _source(job: Job) -> Rows:
        """Rows of the true weights: not of the packed file, which is to be judged."""
        from memladder.engine.packed import packing
        from memladder.models import weights

        path = weights.ensure(job.config, job.cache_dir, job.seed)
        return packing.reader(lambda name: (path, name))

    @staticmethod
    def _states(job: Job) -> Tensor:
        import torch

        states = torch.from_numpy(hidden_states(job.config, job.case.shape, job.seed))
        return states.reshape(-1, states.shape[-1])[:_SAMPLE]

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of float16 (2^-11), in which activations are kept between steps.

        Where they are quantised the Triton kernels may err more: `_STEPS`.
        """
        return 2e-3 if device == "cpu" or self.activation == "fp16" else _STEPS

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import torch and the engine."""
        return _Session(job, announce, self)

    def activation_format(self) -> Format | None:
        """None for fp16: what is in fp16 already needs no rounding."""
        return None if self.activation == "fp16" else formats.get(self.activation)


class _Session(Session):
    """A layer of the engine: weights in one block, one arena, and on CUDA one graph."""

    def __init__(self, job: Job, announce: Callable[[str], None], variant: Ladder) -> None:
        super().__init__(job, announce)
        self._on_cuda = job.case.device != "cpu"
        # Compiled kernels go where all made files go, unless the user has said otherwise.
        os.environ.setdefault("TRITON_CACHE_DIR", str(own_folder(job.cache_dir / "triton")))
        import torch

        from memladder.engine.compile import layers
        from memladder.engine.packed import packed_layer
        from memladder.engine.program import plan
        from memladder.engine.run import driver, execute

        self._torch, self._driver = torch, driver
        self._device = torch.device(job.case.device)
        self._execute, self._plan = execute, plan
        self._layers, self._packed_layer = layers, packed_layer
        kernels = "cuda" if self._on_cuda else "naive"
        self._kernels = importlib.import_module(f"memladder.kernels.{kernels}")
        self._variant = variant
        self._weight = formats.get(variant.weight)
        self._activation = variant.activation_format()

    def context(self) -> None:
        """On CUDA a context without stacks; nothing to bring up on the CPU."""
        if self._on_cuda:
            self._driver.lean_context(self._device.index or 0)
            from memladder import __version__
            from memladder.kernels.cuda import tuning

            self._tuned = tuning.load(tuning.path(self.job.cache_dir, __version__))

    def weights(self) -> None:
        """Map the packed layer. On the CPU its pages come in when the first pass reads them; on
        CUDA it is copied into one block."""
        job = self.job
        path = self._layers.ensure_packed(job.config, self._weight, job.cache_dir, job.seed)
        self._layer: PackedLayer = self._packed_layer.load(path)
        if self._on_cuda:
            block = self._empty(self._packed_layer.device_bytes(self._layer))
            self._layer = self._packed_layer.on_device(self._layer, block)

    def compile(self) -> None:
        """Write the program, plan the arena, and take it; on CUDA compile the kernels and record
        their launches as a graph."""
        job = self.job
        program = self._layer.form.program(job.case.shape, self._activation)
        self._planned = self._plan.plan(program)
        size = self._execute.arena_bytes(program, self._planned, self._kernels)
        self._workspace_bytes = size - self._planned.nbytes
        arena = self._empty(size)
        self._execution = self._execute.Execution(
            program, self._planned, self._layer, self._kernels, arena
        )
        if self._on_cuda:
            # Zeros stand in for hidden states while kernels are compiled and recorded.
            self._states = self._torch.zeros(self._execution.input.shape, dtype=self._torch.float16)
            self._execution.input.copy_(self._states)
            with memory_errors():
                self._graph = self._driver.CudaGraph(self._execution.run, self._device)
            fill_hidden_states(self._states.numpy(), job.seed)

    def _empty(self, size: int) -> Tensor:
        with memory_errors():
            return self._torch.empty(size, dtype=self._torch.uint8, device=self._device)

    def run(self) -> None:
        """The hidden states into the arena, where the last pass has overwritten them; one pass."""
        with memory_errors(), self._torch.inference_mode():
            if self._on_cuda:
                self._execution.input.copy_(self._states)
                self._graph.run()
            else:
                fill_hidden_states(self._execution.input.numpy(), self.job.seed)
                self._execution.run()

    def output(self) -> np.ndarray:
        """What the last pass left in the arena."""
        shape = self.job.case.shape
        states = self._execution.output.cpu().float()
        found: np.ndarray = states.view(shape.batch_size, shape.seq_len, -1).numpy()
        return found

    def settings(self) -> Mapping[str, Setting]:
        """Formats, the arena, and the kernels that ran."""
        from memladder.engine.program.steps import CHUNK
        from memladder.models import onnx_export, parameters

        on_device = (
            {
                "cuda_graph_nodes": self._graph.launches,
                "stack_limit_bytes": 0,
                "cuts": "tuned" if self._tuned else "shipped",
                "kernel_path": "hopper" if self._kernels.has_wgmma() else "portable",
            }
            if self._on_cuda
            else {"threads": self._torch.get_num_threads()}
        )
        return {
            "weight_format": str(self._weight),
            "activation_format": self._variant.activation,
            "bits_per_weight": round(8 * self._layer.nbytes / parameters(self.job.config), 4),
            "compiled_from": "onnx",
            "onnx_opset": onnx_export.OPSET,
            "dtype": "float16",
            "kernels": "triton" if self._on_cuda else "naive",
            "chunk_tokens": CHUNK,
            "arena_alignment": self._plan.ALIGNMENT,
            **on_device,
            **self._variant.environment(self.job.case),
        }

    def categories(self) -> Mapping[str, int]:
        """Packed weights, the arena, and the least that any plan of it could take."""
        return {
            "weights": self._layer.nbytes,
            "arena": self._planned.nbytes,
            "workspace": self._workspace_bytes,
            "arena_lower_bound": self._planned.lower_bound,
        }


def _variants() -> dict[str, Ladder]:
    """A variant a weight format, with the activations that go with it."""
    rows = [name for name in formats.names() if formats.literal(name, "is_row")]
    pairs = [(str(formats.literal(name, "activation")), name) for name in rows]
    return {f"{activation}_{weight}": Ladder(activation, weight) for activation, weight in pairs}


FRAMEWORK = Ladder("fp16", "fp16")
VARIANTS = _variants()
