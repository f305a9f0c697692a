"""Other int4 products, to be timed beside the engine's: vLLM's Marlin and PyTorch's tinygemm.

Both multiply symmetric int4 weights, codes 0 … 15 for −8 … 7 and a scale for every group along the
columns; the weights are random, on the GPU. `check` holds a peer against its dequantised weights.

Marlin needs vLLM's compiled file alone (`vllm/_C*.so` on the Python path), not that it imports.
Its kernels for fp16 are PTX for compute capability 8.0: elsewhere the driver compiles them at the
first product of a process, for half a minute, and keeps what it compiled in its cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from memladder.core.errors import UnavailableError

# vLLM's ScalarType.id of uint4b8, fields from bit 0: exponent 8 bits, mantissa 8, sign 1, bias 32,
# finite only 1, NaN's kind 8 (vllm/scalar_type.py in 0.22.1).
UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
MARLIN_GROUPS = (32, 64, 128)
TINYGEMM_GROUPS = (32, 64, 128, 256)
INNER_K_TILES = 8  # 16-byte loads, tinygemm's widest
VLLM = "pip install vllm==0.22.1"


@dataclass(frozen=True)
class Peer:
    """A product of another library: `peer(x)` is x [M, columns] by the weight's transpose."""

    title: str
    rows: int
    columns: int
    group_size: int
    dtype: torch.dtype  # of x, the scales and the result
    bound: float  # on the relative error
    nbytes: int  # of the packed weight and its scales
    run: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, columns] → [M, rows], both contiguous and of the peer's dtype."""
        return self.run(x)


def marlin(rows: int, columns: int, group_size: int) -> Peer:
    """vLLM's Marlin, fp16, called as vLLM calls it for a GPTQ layer without act-order.

    Source: apply_gptq_marlin_linear in vLLM's layers/quantization/utils/marlin_utils.py, 0.22.1.
    Raises UnavailableError without a GPU or vLLM's operators, or for a shape that Marlin refuses.
    """
    _need_gpu("Marlin")
    _load_vllm()
    if rows % 64 or columns % 128 or columns % group_size or group_size not in MARLIN_GROUPS:
        raise UnavailableError(
            f"Marlin can't multiply {rows}x{columns} in groups of {group_size}: rows in 64s, "
            f"columns in 128s and in whole groups of {', '.join(map(str, MARLIN_GROUPS))}"
        )
    codes, scales = weights(rows, columns, group_size, torch.float16)
    none = torch.empty(0, dtype=torch.int32, device="cuda")  # zero points, g_idx, permutation
    packed = torch.ops._C.gptq_marlin_repack(
        pack_gptq(codes), none, columns, rows, 4, False
    )  # int32 [columns / 16, 2 rows]
    scales = permute_scales(scales)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    locks = torch.zeros(processors, dtype=torch.int32, device="cuda")  # the kernel leaves zeros

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops._C.marlin_gemm(
            x,
            None,  # output
            packed,
            None,  # bias
            scales,
            None,  # scales of x
            None,  # global scale
            none,  # zero points
            none,  # g_idx
            none,  # permutation
            locks,
            UINT4B8,
            x.shape[0],
            rows,
            columns,
            True,  # is_k_full
            False,  # use_atomic_add
            True,  # use_fp32_reduce
            False,  # is_zp_float
        )
        return y

    nbytes = packed.nbytes + scales.nbytes
    return Peer("vLLM Marlin", rows, columns, group_size, torch.float16, 2e-3, nbytes, run)


def torch_int4(rows: int, columns: int, group_size: int) -> Peer:
    """PyTorch's own int4 product, tinygemm, bf16.

    Source: aten/src/ATen/native/cuda/int4mm.cu; the even column is the high half of a byte.
    Raises UnavailableError without a GPU, or for a shape that tinygemm refuses.
    """
    _need_gpu("PyTorch's int4")
    if rows % 8 or columns % 128 or columns % group_size or group_size not in TINYGEMM_GROUPS:
        raise UnavailableError(
            f"tinygemm can't multiply {rows}x{columns} in groups of {group_size}: rows in 8s, "
            f"columns in 128s and in whole groups of {', '.join(map(str, TINYGEMM_GROUPS))}"
        )
    codes, scales = weights(rows, columns, group_size, torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack(
        codes[:, ::2] << 4 | codes[:, 1::2], INNER_K_TILES
    )  # int32 [rows / 8, columns / 128, 32, 4]
    # [groups, rows, 2]: scale, and what code 8 stands for
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1)

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group_size, pairs)
        return y

    nbytes = packed.nbytes + pairs.nbytes
    return Peer("PyTorch int4", rows, columns, group_size, torch.bfloat16, 1e-2, nbytes, run)


def check(peer: Peer, batch_size: int) -> float:
    """The relative error of a product with normal x; AssertionError beyond the peer's bound."""
    x = torch.randn(batch_size, peer.columns, device="cuda").to(peer.dtype)
    found = peer(x).float()  # [M, rows]
    codes, scales = weights(peer.rows, peer.columns, peer.group_size, peer.dtype)
    expected = torch.empty_like(found)
    for start in range(0, peer.rows, 4096):
        some = slice(start, start + 4096)
        expected[:, some] = x.float() @ dequantise(codes[some], scales[:, some]).T
    error = float((found - expected).norm() / expected.norm())
    what = f"{peer.title} {peer.rows}x{peer.columns}, batch {batch_size}"
    # Not `error >= bound`: NaN must not pass.
    if not error < peer.bound:
        raise AssertionError(
            f"{what}: relative error {error:.2e}, at most {peer.bound:.0e} allowed"
        )
    return error


def weights(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, uint8 [rows, columns] of 0 … 15, and scales [groups, rows]; always the same."""
    random = torch.Generator(device).manual_seed(0)
    codes = torch.randint(
        0, 16, (rows, columns), dtype=torch.uint8, device=device, generator=random
    )
    scales = torch.rand(columns // group_size, rows, device=device, generator=random)
    return codes, (0.01 + 0.01 * scales).to(dtype)


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [rows, columns] and scales [groups, rows] → float32 [rows, columns]."""
    rows, groups = codes.shape[0], scales.shape[0]
    values = (codes.float() - 8).view(rows, groups, -1) * scales.T.float().unsqueeze(-1)
    return values.view(codes.shape)


def pack_gptq(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, columns] → int32 [columns / 8, rows], the first of eight columns lowest."""
    rows, columns = codes.shape
    words = torch.zeros(columns // 8, rows, dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= codes[:, place::8].T.to(torch.int32) << 4 * place
    return words


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [groups, rows] in Marlin's order of rows, same shape.

    Source: marlin_permute_scales and get_scale_perms in vLLM's marlin_utils.py, as transpositions:
    every 64 rows as 8 × 8, or where one group is the whole row, every 32 as 4 × 4 pairs.
    """
    if scales.shape[0] > 1:
        tiles = scales.reshape(-1, 8, 8).transpose(1, 2)
    else:
        tiles = scales.reshape(-1, 4, 4, 2).transpose(1, 2)
    return tiles.reshape(scales.shape).contiguous()


def _need_gpu(title: str) -> None:
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"{title} needs an NVIDIA GPU; PyTorch {torch.__version__} sees none"
        )


def _load_vllm() -> None:
    """Register vLLM's operators from its compiled file, without importing vLLM."""
    if hasattr(torch.ops._C, "marlin_gemm"):
        return
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("_C.*so")]
    if not files:
        raise UnavailableError("Marlin needs vllm/_C.*.so, which is not on the Python path", VLLM)
    try:
        torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UnavailableError(
            f"{files[0].name} of vLLM does not load with PyTorch {torch.__version__}: {reason}",
            VLLM,
        ) from error
    for name in ("marlin_gemm", "gptq_marlin_repack"):
        if not hasattr(torch.ops._C, name):
            raise UnavailableError(f"{files[0].name} of vLLM has no operator {name}", VLLM)
