"""bitsandbytes' nf4: what stays of a matrix, and what quantising and multiplying take meanwhile.

Source: bitsandbytes 0.50, functional.py (`quantize_4bit`), backends/cuda/ops.py (`gemm_4bit`: few
rows are multiplied from the codes; for more a matrix is written out in 16 bits, and cuBLAS
multiplies).
"""

from __future__ import annotations

from memladder.frameworks._rules.caching_allocator import CachingAllocator
from memladder.frameworks._rules.inductor import Product
from memladder.frameworks._rules.torch_layer import Package
from memladder.models.architecture import TensorSpec

_BLOCK, _BLOCKS = 64, 256
_BOOK, _SECOND_BOOK, _OFFSET = 16 * 4, 256 * 4, 4
# Streaming multiprocessors of an H100 and an H200, the only GPUs whose thresholds are here.
_PROCESSORS = 132
_SMALL_WEIGHT = 4 << 20


def load(allocator: CachingAllocator, tensor: TensorSpec) -> tuple[int, int]:
    """16 bits to codes and float32 maxima of blocks, and these to 8 bits."""
    rows, columns = tensor.shape
    blocks = -(-rows * columns // _BLOCK)
    groups = -(-blocks // _BLOCKS)
    matrix = allocator.malloc(2 * rows * columns)
    maxima = allocator.malloc(4 * blocks)
    for size in (rows * columns // 2, _BOOK, _OFFSET):
        allocator.malloc(size)
    centred = allocator.malloc(4 * blocks)
    for size in (_SECOND_BOOK, 4 * groups, blocks):
        allocator.malloc(size)
    allocator.free(centred, maxima, matrix)
    return rows * columns // 2, blocks + 4 * groups


def multiplied(matrix: TensorSpec, biased: bool, rows: int) -> Product:
    """From the codes; or both float32 forms of the maxima and the matrix in 16 bits."""
    if _from_codes(rows, *matrix.shape):
        return Product((), planned=False)
    blocks = -(-matrix.elements // _BLOCK)
    before = (4 * blocks, 4 * blocks, 2 * matrix.elements)
    return Product(("cublas", "cublaslt") if biased else ("cublas",), before, planned=False)


def _from_codes(rows: int, width: int, depth: int) -> bool:
    """`_gemm_4bit_use_custom_cuda` for sm_90: rows of activations against the matrix's [N, K]."""
    waves = -(-width // 64) / _PROCESSORS
    if rows <= 4:
        return True
    if width * depth < _SMALL_WEIGHT:
        if 2 * depth < width:
            return rows <= (512 if waves < 1 / 3 else 320)
        return rows <= (32 if waves <= 1 / 4 else 16 if waves <= 1 / 2 else 0)
    if rows < 8:
        wide = rows >= 6 and width > 35 * 64
        tall = depth > width and waves < 0.75
        square = depth == width and 0.6 <= waves < 0.75
        return not (wide and (tall or square))
    if waves < 1 / 2 or (depth >= width and waves < 0.75):
        return False
    limits = ((3, 64), (2, 48), (1, 32), (0, 16))
    return rows <= next(limit for least, limit in limits if waves >= least)


PACKAGE = Package(load, multiplied, sum_over="down")
