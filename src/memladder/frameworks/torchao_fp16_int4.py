"""torchao's int4 weights: groups of 128 along a row, a scale and a zero point each.

On CUDA the packing that PyTorch's own int4 kernel reads (`tile_packed_to_4d`), which takes bfloat16
activations; on the CPU the packing of PyTorch's CPU kernel, which torchao still calls a prototype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memladder.frameworks._shared.base import Job, Setting
from memladder.frameworks._shared.torch_common import TORCH_VARIABLES
from memladder.frameworks._shared.torch_quantised import Quantised, group_size
from memladder.models import LayerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memladder.frameworks._rules.question import Answer, Question

# `_convert_weight_to_int4pack` on CUDA: tiles of 8 rows, and of 1024 columns in torchao's packing.
_TILE = (8, 1024)
_SCALE_AND_ZERO_BYTES = 4


class TorchAOInt4(Quantised):
    """Int4WeightOnlyConfig."""

    title = "torchao-W_INT4 A_FP16"
    package = "torchao"
    packages = ("torchao", "torch", "triton", "transformers", "safetensors")
    variables = ("TORCHAO_*", *TORCH_VARIABLES)

    def dtype(self, device: torch.device) -> tuple[torch.dtype, str]:
        """bfloat16 on CUDA: two bytes as well."""
        import torch

        if device.type == "cpu":
            return super().dtype(device)
        return torch.bfloat16, "torchao's tile-packed int4 takes bfloat16 activations"

    def tolerance(self, device: str) -> float:
        """Four unit roundoffs of bfloat16 (2^-8), on both devices."""
        del device
        return 1.6e-2

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """The same module, with an int4 tensor for its weight."""
        from torchao.prototype.quantization.int4 import inference_workflow as cpu
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        size = group_size(config)
        chosen = (
            cpu.PrototypeInt4WeightOnlyConfig(group_size=size, set_inductor_config=False)
            if linear.weight.device.type == "cpu"
            else Int4WeightOnlyConfig(
                group_size=size,
                int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
                set_inductor_config=False,
            )
        )
        quantize_(linear, chosen)
        return linear

    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Codes, and scales with zero points; the whole matrix where torchao passed over it."""
        weight = module.get_parameter("weight")
        names = getattr(weight, "tensor_data_names", None)
        tensors = [weight] if names is None else [getattr(weight, name) for name in names]
        return {"weights": sum(tensor.nbytes for tensor in tensors)}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """What the kernel makes of the identity: torchao has no other way back."""
        import torch

        weight = module.get_parameter("weight")
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.inference_mode():
            return torch.nn.functional.linear(unit, weight).t().float().cpu().contiguous()

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """Half a byte an element, four bytes a group; on CUDA of a padded matrix."""
        if job.case.device != "cpu":
            rows, columns = (
                -(-n // tile) * tile for n, tile in zip((rows, columns), _TILE, strict=True)
            )
        groups = rows * columns // group_size(job.config)
        return rows * columns // 2 + _SCALE_AND_ZERO_BYTES * groups

    def predict(self, question: Question) -> Answer:
        """As PyTorch's, with this package's matrices and products."""
        from memladder.frameworks._rules import torch_layer, torchao

        return torch_layer.predict(question, torchao.INT4)

    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        """Groups, and how zero points are chosen."""
        return {"group_size": group_size(job.config), "algorithm": "tinygemm", "zero_points": True}


FRAMEWORK = TorchAOInt4()
