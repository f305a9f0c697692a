"""gemlite's int4: groups of 128 along a row, an fp16 scale each, codes around 8.

gemlite brings kernels and packing, and takes a matrix that is quantised: here by `formats.int4`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memladder.frameworks._shared.base import Availability, Job, Setting
from memladder.frameworks._shared.torch_common import TORCH_VARIABLES
from memladder.frameworks._shared.torch_quantised import Quantised, group_size
from memladder.models import LayerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memladder.frameworks._rules.question import Answer, Question

_SCALE_BYTES = 2
_ZERO = 8


class GemLiteInt4(Quantised):
    """GemLiteLinear with 4-bit weights."""

    title = "gemlite-W_INT4 A_FP16"
    package = "gemlite"
    packages = ("gemlite", "torch", "triton", "transformers", "safetensors")
    variables = ("GEMLITE_*", *TORCH_VARIABLES)

    def availability(self, device: str) -> Availability:
        """Its kernels are Triton's."""
        found = super().availability(device)
        if found.available and device == "cpu":
            return Availability(False, found.version, "gemlite's kernels run on GPUs only")
        return found

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """A GemLiteLinear."""
        from gemlite import DType, GemLiteLinear

        _take_default_tiles()
        made: Any = GemLiteLinear(
            W_nbits=4,
            group_size=group_size(config),
            in_features=linear.in_features,
            out_features=linear.out_features,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        matrix = _int4(config).quantise(linear.weight.data)
        made.pack(matrix.codes, matrix.scales, _ZERO, bias=linear.bias)
        module: nn.Module = made
        return module

    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Codes and scales; what says of which kind they are is beside them."""
        sizes = {name: tensor.nbytes for name, tensor in module.named_parameters()}
        weights = sizes.pop("W_q") + sizes.pop("scales")
        sizes.pop("bias", None)
        return {"weights": weights, "tables": sum(sizes.values())}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """Codes, unpacked from words of 32 bits along the columns, times scales."""
        import torch

        words = module.get_parameter("W_q").cpu()  # [in / 8, out]
        shifts = torch.arange(0, 32, 4, dtype=words.dtype)
        codes = (words.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15  # [in / 8, 8, out]
        scales = module.get_parameter("scales").float().cpu()  # [groups, out]
        values = (codes.flatten(0, 1).float() - _ZERO).view(scales.shape[0], -1, scales.shape[1])
        return (values * scales.unsqueeze(1)).flatten(0, 1).t().contiguous()

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """Half a byte an element, an fp16 scale a group."""
        return rows * columns // 2 + _SCALE_BYTES * rows * columns // group_size(job.config)

    def predict(self, question: Question) -> Answer:
        """As PyTorch's, with this package's matrices and products."""
        from memladder.frameworks._rules import gemlite, torch_layer

        return torch_layer.predict(question, gemlite.PACKAGE)

    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        """Groups, and how kernels are tuned."""
        return {
            "group_size": group_size(job.config),
            "zero": _ZERO,
            "packing_bitwidth": 32,
            "autotune": "default",
        }


def _take_default_tiles() -> None:
    """gemlite's autotune setting `default`: one or two tiles a kernel, where `fast` compiles some
    twenty, minutes a layer. Which is taken changes no tensor's bytes.

    `gemlite.set_autotune` loads the kernels' modules again, but not the table of kernels that a
    product takes them from (0.6.0.post2).
    """
    from gemlite import core

    for kernel in core.GEMLITE_TRITON_MAPPING.values():
        tiles = importlib.import_module(kernel.__module__).get_default_config()
        for tuner in kernel.kernel:
            # Twice: of a single one the tuner would not ask whether it fits the matrix.
            tuner.configs = 2 * tiles


def _int4(config: LayerConfig) -> Any:
    from memladder.formats.int4 import Int4

    return Int4(group_size=group_size(config))


FRAMEWORK = GemLiteInt4()
