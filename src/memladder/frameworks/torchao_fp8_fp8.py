"""torchao's float8: e4m3 weights with a scale a row, activations rounded to e4m3 a token at a time.

torchao asks for compute capability 8.9, and for bfloat16 where scales are of rows. Its wheels have
no float8 kernels for CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memladder import formats
from memladder.core.devices import compute_capability
from memladder.frameworks._shared.base import Availability, Job, Setting
from memladder.frameworks._shared.torch_common import TORCH_VARIABLES
from memladder.frameworks._shared.torch_quantised import Quantised
from memladder.models import LayerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memladder.frameworks._rules.question import Answer, Question

_LEAST = (8, 9)
_SCALE_BYTES = 4


class TorchAOFp8(Quantised):
    """Float8DynamicActivationFloat8WeightConfig, per row."""

    title = "torchao-W_FP8 A_FP8"
    package = "torchao"
    packages = ("torchao", "torch", "triton", "transformers", "safetensors")
    variables = ("TORCHAO_*", *TORCH_VARIABLES)

    def availability(self, device: str) -> Availability:
        """GPUs with fp8 arithmetic only."""
        found = super().availability(device)
        if not found.available:
            return found
        if device == "cpu":
            return Availability(False, found.version, "torchao has no float8 kernels for CPUs")
        capability = compute_capability(device)
        if capability is not None and capability < _LEAST:
            reason = (
                f"float8 needs compute capability 8.9; {device} has {capability[0]}.{capability[1]}"
            )
            return Availability(False, found.version, reason)
        return found

    def dtype(self, device: torch.device) -> tuple[torch.dtype, str]:
        """bfloat16."""
        import torch

        del device
        return torch.bfloat16, "torchao's float8 with scales of rows takes bfloat16 activations"

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of bfloat16, and once more as much for activations that move over a
        step of e4m3 (2^-4): of values that differ by 2^-9 one in 32 does, which adds 2^-4 / √32."""
        del device
        return 3.2e-2

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """The same module, with a float8 tensor for its weight."""
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        del config
        chosen = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        quantize_(linear, chosen)
        return linear

    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Elements and scales; the whole matrix where torchao passed over it."""
        weight = module.get_parameter("weight")
        parts = [getattr(weight, name) for name in getattr(weight, "tensor_data_names", ())]
        return {"weights": sum(part.nbytes for part in parts or [weight])}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """Elements times scales."""
        weight = module.get_parameter("weight")
        matrix: torch.Tensor = weight.qdata.float() * weight.scale  # type: ignore[attr-defined]
        return matrix.cpu()

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Each token to e4m3, its largest magnitude to 448."""
        fp8 = formats.get("fp8")
        tokens = states.flatten(0, -2)
        return fp8.dequantise(fp8.quantise(tokens)).view(states.shape)

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """A byte an element, a float32 scale a row."""
        del job
        return rows * columns + _SCALE_BYTES * rows

    def predict(self, question: Question) -> Answer:
        """As PyTorch's, with this package's matrices and products."""
        from memladder.frameworks._rules import torch_layer, torchao

        question.require_capability(_LEAST, self.title)
        return torch_layer.predict(question, torchao.FP8)

    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        """Granularity."""
        del job
        return {"granularity": "per row", "element": "e4m3", "activation_scales": "dynamic"}


FRAMEWORK = TorchAOFp8()
