"""bitsandbytes' nf4: blocks of 64, whose scales are quantised too (double quantisation).

Source of the format: Dettmers et al. 2023 (arXiv:2305.14314), section 3: 8 bits a block of 64, and
float32 a group of 256 blocks, 4.127 bits a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memladder.frameworks.base import Job, Setting
from memladder.frameworks.torch_quantised import Quantised
from memladder.models import LayerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = 64
_BLOCKS = 256


class BitsAndBytesNf4(Quantised):
    """Linear4bit."""

    title = "bitsandbytes-W_NF4 A_FP16"
    package = "bitsandbytes"
    packages = ("bitsandbytes", "torch", "triton", "transformers", "safetensors")

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """A Linear4bit; moving it to its device is what quantises."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        del config
        weight = linear.weight
        made: nn.Module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=weight.dtype,
            device="meta",
        )
        made.weight = Params4bit(
            weight.data, quant_type="nf4", compress_statistics=True, module=made
        ).to(weight.device)
        made.bias = linear.bias
        return made

    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Codes and scales, and beside them the two tables that each matrix has."""
        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        if state is None:
            return {"weights": weight.nbytes}
        scales = state.absmax.nbytes + state.state2.absmax.nbytes
        tables = state.code.nbytes + state.state2.code.nbytes + state.offset.nbytes
        return {"weights": weight.nbytes + scales, "tables": tables}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """bitsandbytes' own way back."""
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = module.get_parameter("weight")
        matrix: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return matrix.float().cpu()

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """Half a byte an element, a byte a block, four bytes 256 blocks."""
        del job
        blocks = -(-rows * columns // _BLOCK)
        return rows * columns // 2 + blocks + 4 * -(-blocks // _BLOCKS)

    def format_settings(self, config: LayerConfig) -> Mapping[str, Setting]:
        """Blocks and storage."""
        del config
        return {"quant_type": "nf4", "blocksize": _BLOCK, "compress_statistics": True}


FRAMEWORK = BitsAndBytesNf4()
