"""Ladder: memladder's own engine. Weights in a number format, one planned arena.

A variant's name reads activation, then weight: `ladder_int8_int1` has int8 activations and int1
weights; `ladder` alone is fp16. The figure has six. A weight format that the figure lacks is a
variant with fp16 activations.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from memladder import formats
from memladder.case import FIGURE_SYSTEMS
from memladder.frameworks.base import Availability, Framework, Job, Session, Setting
from memladder.frameworks.torch_memory import memory_errors

if TYPE_CHECKING:
    import numpy as np

    from memladder.formats.base import Format

_INSTALL = "pip install 'memladder[ladder]'"
_NEEDED = ("torch", "transformers", "safetensors")
# Kept as it is, or an activation's format only.
_NO_WEIGHTS = {"fp16", "int8"}


class Ladder(Framework):
    """The engine with one format for activations and one for weights."""

    packages = ("torch", "transformers", "safetensors")

    def __init__(self, activation: str, weight: str) -> None:
        self.activation = activation
        self.weight = weight
        self.title = f"Ladder-W_{weight.upper()} A_{activation.upper()}"

    def availability(self, device: str) -> Availability:
        """Its CUDA kernels have not run on a GPU yet."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", _INSTALL)
        version = importlib.metadata.version("torch")
        if device != "cpu":
            reason = "the engine does not use its CUDA kernels yet; it runs with --device cpu"
            return Availability(False, version, reason)
        return Availability(True, version)

    def prepare(self, job: Job) -> None:
        """The packed layer."""
        from memladder.engine import packing

        packing.ensure(job.config, formats.get(self.weight), job.cache_dir, job.seed)

    def reference(self, job: Job) -> np.ndarray:
        """The layer in fp32 on the dequantised weights, activations rounded alike."""
        from memladder.engine import packed_layer, packing, reference

        path = packing.ensure(job.config, formats.get(self.weight), job.cache_dir, job.seed)
        packed = packed_layer.load(path)
        return reference.output(packed, job.case.shape, job.seed, self.activation_format())

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of float16 (2^-11), in which activations are kept between steps."""
        del device
        return 2e-3

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import torch and the engine."""
        return _Session(job, announce, self)

    def activation_format(self) -> Format | None:
        """None for fp16: what is in fp16 already needs no rounding."""
        return None if self.activation == "fp16" else formats.get(self.activation)


class _Session(Session):
    def __init__(self, job: Job, announce: Callable[[str], None], variant: Ladder) -> None:
        super().__init__(job, announce)
        import torch

        from memladder.engine import execute, packed_layer, packing, plan, programs
        from memladder.kernels import naive

        self._torch = torch
        self._execute, self._plan, self._programs = execute, plan, programs
        self._packing, self._packed_layer = packing, packed_layer
        self._kernels = naive
        self._variant = variant
        self._weight = formats.get(variant.weight)
        self._activation = variant.activation_format()

    def context(self) -> None:
        """Nothing to bring up on the CPU."""

    def weights(self) -> None:
        """Map the packed layer; its pages come in when the first pass reads them."""
        job = self.job
        path = self._packing.ensure(job.config, self._weight, job.cache_dir, job.seed)
        self._layer = self._packed_layer.load(path)

    def compile(self) -> None:
        """Write the program, plan the arena, and take it."""
        job = self.job
        definition = self._programs.definition(job.config.model)
        program = definition.program(job.config.values, job.case.shape, self._activation)
        self._planned = self._plan.plan(program)
        with memory_errors():
            arena = self._torch.empty(self._planned.nbytes, dtype=self._torch.uint8)
        self._execution = self._execute.Execution(
            program, self._planned, self._layer, self._kernels, arena
        )

    def run(self) -> None:
        """The hidden states into the arena, where the last pass has overwritten them; one pass."""
        from memladder.models.weights import fill_hidden_states

        with memory_errors(), self._torch.inference_mode():
            fill_hidden_states(self._execution.input.numpy(), self.job.seed)
            self._execution.run()

    def output(self) -> np.ndarray:
        """What the last pass left in the arena."""
        shape = self.job.case.shape
        states = self._execution.output.float()
        found: np.ndarray = states.view(shape.batch_size, shape.seq_len, -1).numpy()
        return found

    def settings(self) -> Mapping[str, Setting]:
        """Formats, the arena, and the kernels that ran."""
        from memladder.engine.programs.build import CHUNK
        from memladder.models import parameters

        return {
            "weight_format": str(self._weight),
            "activation_format": self._variant.activation,
            "bits_per_weight": round(8 * self._layer.nbytes / parameters(self.job.config), 4),
            "dtype": "float16",
            "kernels": "naive",
            "chunk_tokens": CHUNK,
            "arena_alignment": self._plan.ALIGNMENT,
            "threads": self._torch.get_num_threads(),
        }

    def categories(self) -> Mapping[str, int]:
        """Packed weights, the arena, and the least that any plan of it could take."""
        return {
            "weights": self._layer.nbytes,
            "arena": self._planned.nbytes,
            "arena_lower_bound": self._planned.lower_bound,
        }


def _variants() -> dict[str, Ladder]:
    figure = [name.removeprefix("ladder_") for name in FIGURE_SYSTEMS if "ladder_" in name]
    pairs = [(name.partition("_")[0], name.partition("_")[2]) for name in figure]
    drawn = {weight for _, weight in pairs}
    pairs += [("fp16", name) for name in formats.names() if name not in drawn | _NO_WEIGHTS]
    return {f"{activation}_{weight}": Ladder(activation, weight) for activation, weight in pairs}


FRAMEWORK = Ladder("fp16", "fp16")
VARIANTS = _variants()
