"""bitsandbytes' nf4: blocks of 64, whose scales are quantised too (double quantisation).

Source of the format: Dettmers et al. 2023 (arXiv:2305.14314), section 3: 8 bits a block of 64, and
float32 a group of 256 blocks, 4.127 bits a weight.

On a CPU with avx512_bf16 bitsandbytes repacks a matrix on its first use (0.50.2,
`functional._convert_weight_packed_for_cpu`): tiles of 32 rows, a bfloat16 scale a block, which are
quantised no more: 4.25 bits a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memladder.frameworks._shared.base import Job, Setting
from memladder.frameworks._shared.torch_common import TORCH_VARIABLES
from memladder.frameworks._shared.torch_quantised import Quantised
from memladder.models import LayerConfig, tensor_shapes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memladder.frameworks._rules.question import Answer, Question

_BLOCK = 64
_BLOCKS = 256
_TILE_ROWS = 32


class BitsAndBytesNf4(Quantised):
    """Linear4bit."""

    title = "bitsandbytes-W_NF4 A_FP16"
    package = "bitsandbytes"
    packages = ("bitsandbytes", "torch", "triton", "transformers", "safetensors")
    variables = ("BNB_*", "BITSANDBYTES_*", *TORCH_VARIABLES)

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """A Linear4bit; moving it to its device is what quantises."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        del config
        weight = linear.weight
        made: Any = Linear4bit(
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
        # Where tiles or blocks don't divide the matrix, repacking would fail.
        made.support_avx512bf16_for_cpu = _repacks(
            linear.out_features, linear.in_features, weight.device.type
        )
        module: nn.Module = made
        return module

    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Codes and scales, and beside them the two tables that each matrix has."""
        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        if state is None:
            return {"weights": weight.nbytes}
        if _is_repacked(state):
            return {"weights": weight.nbytes + state.absmax.nbytes, "tables": state.code.nbytes}
        scales = state.absmax.nbytes + state.state2.absmax.nbytes
        tables = state.code.nbytes + state.state2.code.nbytes + state.offset.nbytes
        return {"weights": weight.nbytes + scales, "tables": tables}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """bitsandbytes' own way back; from tiles, which have none, by their layout."""
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        if _is_repacked(state):
            return _from_tiles(weight.data, state.absmax, state.code)
        matrix: torch.Tensor = dequantize_4bit(weight.data, state)
        return matrix.float().cpu()

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """Half a byte an element, a byte a block, four bytes 256 blocks; two bytes a block where
        the CPU has it repacked."""
        blocks = -(-rows * columns // _BLOCK)
        if _repacks(rows, columns, job.case.device):
            return rows * columns // 2 + 2 * blocks
        return rows * columns // 2 + blocks + 4 * -(-blocks // _BLOCKS)

    def predict(self, question: Question) -> Answer:
        """As PyTorch's, with this package's matrices and products."""
        from memladder.frameworks._rules import bitsandbytes, torch_layer

        return torch_layer.predict(question, bitsandbytes.PACKAGE)

    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        """Blocks and storage, and whether the CPU has matrices repacked."""
        asked: dict[str, Setting] = {
            "quant_type": "nf4",
            "blocksize": _BLOCK,
            "compress_statistics": True,
        }
        if job.case.device != "cpu":
            return asked
        shapes = [shape for shape in tensor_shapes(job.config).values() if len(shape) == 2]
        repacked = sum(_repacks(*shape, job.case.device) for shape in shapes)
        return asked | {"repacked_for_avx512_bf16": f"{repacked} of {len(shapes)} matrices"}


def _repacks(rows: int, columns: int, device: str) -> bool:
    if device != "cpu" or rows % _TILE_ROWS or columns % _BLOCK:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _from_tiles(packed: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Codes, packed uint8 [out, in / 2], as levels [16] times scales [in / 64, out], float32.

    A tile's 32 bytes hold two neighbouring columns of its 32 rows: byte j, low, is row j // 2 and
    column j % 2 of them, and high the same column 16 rows further down.
    """
    import torch

    rows, columns = packed.shape[0], 2 * packed.shape[1]
    tiles = packed.view(rows // _TILE_ROWS, columns // 2, _TILE_ROWS // 2, 2)
    halves = torch.stack((tiles & 15, tiles >> 4), dim=1)  # [tile, half, in / 2, row, column]
    codes = halves.transpose(2, 3).reshape(rows, columns).long()
    return levels[codes].float() * scales.t().float().repeat_interleave(_BLOCK, dim=1)


FRAMEWORK = BitsAndBytesNf4()
