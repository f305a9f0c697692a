"""gemlite's int4: what stays of a matrix, and what quantising and packing take meanwhile.

Source: `formats/int4.py` (memladder quantises; the matrix is widened to float32) and gemlite 0.6,
core.py (`GemLiteLinear.pack`), bitpack.py.
"""

from __future__ import annotations

from memladder.frameworks._rules.caching_allocator import CachingAllocator
from memladder.frameworks._rules.inductor import own_kernels
from memladder.frameworks._rules.torch_layer import Package
from memladder.models.architecture import TensorSpec

_GROUP = 128


def load(allocator: CachingAllocator, tensor: TensorSpec) -> tuple[int, int]:
    """Float32 twice over, scales in float16, codes of a byte, words of eight, transposed."""
    take, free = allocator.malloc, allocator.free
    count = tensor.elements
    groups = count // _GROUP
    matrix = take(2 * count)
    wide = take(4 * count)
    blocks = take(4 * count)
    free(wide)
    low, high, turned, largest = (take(4 * groups) for _ in range(4))
    free(turned, low, high)
    divided = take(4 * groups)
    free(largest)
    stored = take(2 * groups)
    magnitudes = take(2 * groups)
    infinite = take(groups)
    free(magnitudes, infinite, divided)
    vanishes, scales = take(groups), take(2 * groups)
    free(vanishes, stored)
    zeros, exact = take(4 * groups), take(4 * groups)
    quotients = take(4 * count)
    free(exact)
    codes = take(count)
    free(quotients, blocks, zeros)
    words = take(count // 2)
    take(4)
    take(count // 2)
    free(words)
    take(2 * groups)
    for size in (48, 8, 4):
        take(size)
    free(codes, scales, matrix)
    return count // 2, 2 * groups


PACKAGE = Package(load, own_kernels, 2 << 20)
