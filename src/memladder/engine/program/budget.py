"""The memory that a layer is given to run in, from its shapes alone: what the engine aims at.

Weights in their format, norms and biases in float16; and the larger of what two moments need: the
hidden states, all keys and values, and three buffers of a chunk (norm, queries, attention's
output), or the hidden states, a chunk's norm and its MLP's inner activations. float16 throughout;
a chunk is 512 tokens; the output overwrites the input. No process, no library, no page is counted.

It is a budget and not the least: where attention's output takes the place of its queries, as in
BLOOM's layer, a layer runs in a buffer less.
"""

from __future__ import annotations

from dataclasses import dataclass

from memladder.core.case import Workload
from memladder.core.units import MIB
from memladder.engine.program.steps import CHUNK
from memladder.formats._shared.base import Format
from memladder.kernels.packed import matrix_bytes
from memladder.models import LayerConfig, hidden_size, tensor_shapes, widths

_ITEM = 2


@dataclass(frozen=True)
class Budget:
    """Bytes."""

    weights: int
    activations: int

    @property
    def nbytes(self) -> int:
        """Together."""
        return self.weights + self.activations

    def device_bound(self, context: int) -> int:
        """What a process on CUDA may take beside a context of that size, in all: 3 % and 8 MiB
        more, for allocations' granularity and the kernels' code."""
        return (context + self.nbytes) * 103 // 100 + 8 * MIB

    @property
    def host_bound(self) -> int:
        """What a process on the CPU may grow by: 5 % and 64 MiB more, for tiles and libraries."""
        return self.nbytes * 105 // 100 + 64 * MIB


def budget(config: LayerConfig, shape: Workload, kind: Format) -> Budget:
    """The budget of a layer at a shape with weights in a format."""
    hidden, width = hidden_size(config), widths(config)
    chunk = min(CHUNK, shape.tokens)
    attention = 2 * width.keys * shape.tokens + chunk * (hidden + 2 * width.queries)
    mlp = chunk * (hidden + width.inner)
    activations = _ITEM * (hidden * shape.tokens + max(attention, mlp))
    return Budget(_weight_bytes(config, kind), activations)


def _weight_bytes(config: LayerConfig, kind: Format) -> int:
    """Bytes of the layer's matrices in a format, its other parameters in float16, and the float32
    numbers of its positions: from the checkpoint's shapes alone."""
    shapes = tensor_shapes(config).values()
    matrices = sum(matrix_bytes(kind, *shape) for shape in shapes if len(shape) == 2)
    vectors = sum(_ITEM * shape[0] for shape in shapes if len(shape) == 1)
    return matrices + vectors + 4 * widths(config).positions
