"""torchao's int4 and float8: what stays of a matrix, and what quantising takes meanwhile.

Source: torchao 0.18, quantization/quantize_/workflows (`Int4TilePackedTo4dTensor.from_hp`,
`Float8Tensor.from_hp`) and quant_primitives.py, told from the peaks of eleven records of an H100.
"""

from __future__ import annotations

from memladder.frameworks._rules.caching_allocator import CachingAllocator
from memladder.frameworks._rules.inductor import Product, own_kernels
from memladder.frameworks._rules.torch_layer import Package
from memladder.models.architecture import TensorSpec

_GROUP = 128
_TILE = (8, 1024)


def load_int4(allocator: CachingAllocator, tensor: TensorSpec) -> tuple[int, int]:
    """A padded copy, minima and maxima, codes as int32, halves joined, and packed."""
    rows, columns = (-(-n // tile) * tile for n, tile in zip(tensor.shape, _TILE, strict=True))
    half, groups = 2 * rows * columns, 2 * rows * columns // _GROUP
    take, free = allocator.malloc, allocator.free
    matrix = take(2 * tensor.elements)
    padded = take(half)
    least, most = take(groups), take(groups)
    width = take(groups)
    scale = take(groups)
    free(width)
    clamped = take(groups)
    free(scale)
    part = take(groups)
    zero = take(groups)
    free(part, least, most)
    part = take(groups)
    low = take(groups)
    free(part)
    moved = take(half)
    divided = take(half)
    free(moved)
    rounded = take(half)
    free(divided)
    bounded = take(half)
    free(rounded, low)
    wide = take(2 * half)
    free(bounded)
    shifted = take(half)
    joined = take(half)
    free(shifted)
    small = take(half // 4)
    free(joined)
    take(half // 4)
    free(small)
    both = take(2 * groups)
    take(2 * groups)
    free(both, clamped, zero, wide, padded, matrix)
    return half // 4, 2 * groups


def load_fp8(allocator: CachingAllocator, tensor: TensorSpec) -> tuple[int, int]:
    """Magnitudes for the scale of each row; float32, divided, clamped, rounded."""
    rows, _ = tensor.shape
    take, free = allocator.malloc, allocator.free
    matrix = take(2 * tensor.elements)
    magnitudes = take(2 * tensor.elements)
    largest = take(2 * rows)
    free(magnitudes)
    take(4 * rows)
    wide = take(4 * tensor.elements)
    divided = take(4 * tensor.elements)
    clamped = take(4 * tensor.elements)
    take(tensor.elements)
    free(clamped, divided, wide, largest, matrix)
    return tensor.elements, 4 * rows


def multiplied_fp8(matrix: TensorSpec, biased: bool, rows: int) -> Product:
    """cuBLASLt's scaled product."""
    del matrix, biased, rows
    return Product(("cublas", "cublaslt"))


FP8 = Package(load_fp8, multiplied_fp8, 2 << 20, rounds_activations=True)
INT4 = Package(load_int4, own_kernels, 2 << 20)
