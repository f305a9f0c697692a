"""What a packed model holds besides its layers: embeddings, norms and head, in one packed file.

The matrices are `embedding` and, where it is not the same, `head`; `embedding.numbers` is what the
codes of the embeddings' format stand for. The vectors are the norms, as kernels multiply them, and
`positions`, one row after the other. A final norm of ones is stored as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from memladder.core.errors import FormatError
from memladder.engine.packed import packed_layer, packing
from memladder.engine.packed.packed_layer import Contents, Weights
from memladder.engine.packed.packing import Blocks, MatrixReport
from memladder.engine.program.model import EMBEDDING, HEAD, HEAD_BIAS, LEARNED, NUMBERS
from memladder.formats._shared.base import Format
from memladder.models.ends import Ends, Norm

_METADATA = MappingProxyType({"memladder_rest": "1"})


def contents(
    ends: Ends, embedding: Format, head: Format, sizes: Mapping[str, tuple[int, ...]]
) -> Contents:
    """What the file holds; `sizes` are the shapes of the model's tensors. A tied matrix is in the
    head's format."""
    table = head if ends.is_tied else embedding
    matrices = {EMBEDDING: (table, ends.vocabulary, ends.hidden_size)}
    vectors = {}
    if not ends.is_tied:
        matrices[HEAD] = (head, ends.vocabulary, ends.hidden_size)
    if ends.head_bias is not None:
        vectors[HEAD_BIAS] = ends.vocabulary
    for name, norm in _norms(ends).items():
        vectors[f"{name}.weight"] = ends.hidden_size
        if norm.kind == "layer":
            vectors[f"{name}.bias"] = ends.hidden_size
    if ends.positions is not None:
        rows, columns = sizes[ends.positions]
        vectors[LEARNED] = rows * columns
    constants = {} if table.bits == 16 else {NUMBERS: 1 << table.bits}
    return Contents(matrices, vectors, constants, _METADATA)


def pack(
    ends: Ends,
    held: Contents,
    read: packing.Rows,
    path: Path,
    *,
    judge: bool = False,
    progress: packing.Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """Write the file. `read` gives rows of a tensor by the model's name. Raises FormatError."""
    blocks = {EMBEDDING: _rows(read, ends.embedding)}
    if not ends.is_tied:
        blocks[HEAD] = _rows(read, ends.head)
    if ends.head_bias is not None:
        blocks[HEAD_BIAS] = _rows(read, ends.head_bias)
    if ends.positions is not None:
        blocks[LEARNED] = _flat(read, ends.positions, ends.hidden_size)
    for name, norm in _norms(ends).items():
        blocks[f"{name}.weight"] = _vector(read, norm.weight, 1.0, norm.shift)
        blocks[f"{name}.bias"] = _vector(read, norm.bias, 0.0, 0.0)
    kind = held.matrices[EMBEDDING][0]
    constants = {}
    if NUMBERS in held.constants:
        codes = torch.arange(1 << kind.bits, dtype=torch.uint8).unsqueeze(0)
        constants[NUMBERS] = kind.decode(codes).flatten().contiguous()
    return packing.write(path, held, blocks, constants, judge=judge, progress=progress)


def load(path: Path, held: Contents) -> Weights:
    """The file's tensors, memory-mapped. Raises FormatError for another file."""
    with packed_layer.opened(path) as file:
        if (file.metadata() or {}) != dict(_METADATA):
            raise FormatError(f"{path}: not the rest of a model packed by this version")
        found = packed_layer.checked(path, file, held.table)
    matrices = {
        name: packed_layer.packed_matrix(*sizes, name, found)
        for name, sizes in held.matrices.items()
    }
    names = (*held.vectors, *held.constants)
    return Weights(matrices, {name: found[name] for name in names})


def _norms(ends: Ends) -> dict[str, Norm]:
    norms = {"embedding_norm": ends.embedding_norm, "final_norm": ends.final_norm}
    return {name: norm for name, norm in norms.items() if norm is not None}


def _rows(read: packing.Rows, name: str) -> Blocks:
    return Blocks(name, _finite(name, lambda start, stop: read(name, start, stop)))


def _flat(read: packing.Rows, name: str, columns: int) -> Blocks:
    """A matrix read as one vector."""

    def rows(start: int, stop: int) -> Tensor:
        assert start % columns == stop % columns == 0
        return read(name, start // columns, stop // columns).flatten()

    return Blocks(name, _finite(name, rows))


def _vector(read: packing.Rows, name: str | None, default: float, shift: float) -> Blocks:
    if name is None:
        return Blocks("", lambda start, stop: torch.full((stop - start,), default))
    stored = name
    return Blocks(
        name, _finite(name, lambda start, stop: read(stored, start, stop).float() + shift)
    )


def _finite(name: str, rows: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        found = rows(start, stop)
        if not found.isfinite().all():
            raise FormatError(f"{name} holds NaN or infinity in rows {start} to {stop - 1}")
        return found

    return read
