"""Bytes that a program moves from and to memory, predicted from shapes alone, and those that its
operators would move as kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence

from memladder.engine.compile.tiles import ITEM_BYTES, cut
from memladder.engine.graph.nodes import Attention, Graph, Input, Linear
from memladder.engine.packed.packed_layer import Form
from memladder.engine.program.steps import Program, Rows, Step
from memladder.kernels.packed import matrix_bytes


def weight_sizes(form: Form) -> dict[str, int]:
    """Bytes of everything that a step may read by name."""
    fused = form.fused
    sizes = {
        name: matrix_bytes(form.format_of(name), *size) for name, size in fused.matrices.items()
    }
    sizes |= {name: 2 * size for name, size in fused.vectors.items()}
    return sizes | {name: 4 * size for name, size in fused.constants.items()}


class Traffic:
    """What a program for a layer moves."""

    def __init__(self, form: Form, program: Program) -> None:
        self._program = program
        self._matrices = form.fused.matrices
        self._sizes = weight_sizes(form)
        self._row_bytes = {buffer.name: buffer.nbytes // buffer.rows for buffer in program.buffers}

    def fused(self) -> int:
        """Of all steps."""
        return sum(map(self.of, self._program.steps))

    def of(self, step: Step) -> int:
        """What a step reads and writes: each of its operands once, and a product's activation again
        where it does not stay in the cache."""
        moved = sum(map(self._size, (*step.reads.values(), *step.writes.values())))
        names = [name for name in step.weights.values() if name in self._matrices]
        return moved + self._weights(step) + (self._read_again(step, names) if names else 0)

    def unfused(self, graph: Graph) -> int:
        """The same if each operator of the graph were a kernel of its own, in the program's chunks:
        values go through memory in fp16; attention writes its scores, reads and writes them as
        softmax, and reads them again. Weights are read as often as the program does."""
        moved = sum(map(self._weights, self._program.steps))
        moved += sum(
            self._read_again(step, [name])
            for step in self._program.steps
            for name in step.weights.values()
            if name in self._matrices
        )
        tokens = graph.shape.tokens
        for node in graph.nodes():
            if isinstance(node, Input):
                continue
            columns = node.columns + sum(x.columns for x in node.inputs)
            if isinstance(node, Linear) and node.bias is not None:
                columns += 2 * node.columns
            moved += tokens * columns * ITEM_BYTES
            if isinstance(node, Attention):
                moved += 4 * node.heads * tokens * graph.shape.seq_len * ITEM_BYTES
        return moved

    def _size(self, rows: Rows) -> int:
        return self._row_bytes[rows.buffer] * rows.count

    def _weights(self, step: Step) -> int:
        return sum(self._sizes[name] for name in step.weights.values())

    def _read_again(self, step: Step, names: Sequence[str]) -> int:
        """The activation's bytes beyond its first reading, in one product of these matrices."""
        x = step.reads["x"]
        columns = sum(self._matrices[name][0] for name in names)
        nbytes = sum(self._sizes[name] for name in names)
        best = cut(x.count, columns, self._matrices[names[0]][1], nbytes)
        return (best.reads - 1) * self._size(x)
