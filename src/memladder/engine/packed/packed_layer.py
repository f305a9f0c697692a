"""A layer packed in number formats, as one safetensors file that says all about itself.

For every matrix `<name>.codes`, `<name>.scales`, `<name>.zeros` as in `kernels.packed`, for every
norm and bias an fp16 vector, for positions a float32 constant. The metadata holds the fused layer,
of which a program of any shape can be made, and the matrices' formats with their parameters; what
the file must contain follows from these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memladder import formats
from memladder.core.case import Workload
from memladder.core.errors import FormatError, UsageError
from memladder.engine.graph.fused import Fused
from memladder.engine.program import fused_json
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.lower import lower
from memladder.engine.program.plan import ALIGNMENT
from memladder.engine.program.steps import CHUNK, Program
from memladder.formats._shared.base import Format
from memladder.kernels.layout import Layout
from memladder.kernels.packed import PackedMatrix

# Part of the metadata: a file in another order is another file.
RECIPE = "3"
_KEYS = ("memladder_packed", "format", "formats", "layer", "shape")

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Held = TypeVar("Held", bound="Weights")


@dataclass(frozen=True)
class Contents:
    """What a packed file holds, without values: matrices [rows, columns] in their formats, sizes of
    float16 vectors and of float32 constants, and what the file says about itself."""

    matrices: Mapping[str, tuple[Format, int, int]]
    vectors: Mapping[str, int]
    constants: Mapping[str, int]
    metadata: Mapping[str, str]

    @property
    def table(self) -> Table:
        """Names, dtypes and shapes of the file's tensors, in the order in which they lie there."""
        return tensor_table(self.matrices, self.vectors, self.constants)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        sizes = self.table.values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in sizes)


@dataclass(frozen=True)
class Form:
    """What a packed layer is, without its weights.

    `format` is that of all matrices but those that `others` name. `shape`: the only one that the
    layer may be run at, because it was compiled from a model of that shape; None for any.
    """

    fused: Fused
    format: Format
    others: Mapping[str, Format]
    shape: Workload | None = None

    def format_of(self, matrix: str) -> Format:
        """The format of a matrix."""
        return self.others.get(matrix, self.format)

    @property
    def plain(self) -> frozenset[str]:
        """Matrices that stay in fp16 where others do not."""
        return frozenset(name for name, kind in self.others.items() if kind.bits == 16)

    @property
    def contents(self) -> Contents:
        """What its file holds."""
        matrices = {
            name: (self.format_of(name), *sizes) for name, sizes in self.fused.matrices.items()
        }
        return Contents(matrices, self.fused.vectors, self.fused.constants, metadata(self))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.contents.nbytes

    def program(
        self,
        shape: Workload,
        activation: Format | None = None,
        *,
        chunk: int = CHUNK,
        budget: int = 0,
        in_place: bool = True,
        cache: CacheShape | None = None,
    ) -> Program:
        """The layer's steps at a shape; see `lower`. Raises UsageError for one that is not its.

        One layer has programs of three kinds: without a `cache`; with one, of many new tokens a
        sequence (a chunk of a prompt: `Workload(1, cache.chunk)`); and of one (a step of decoding:
        `Workload(sequences, 1)`).
        """
        if self.shape not in (None, shape):
            raise UsageError(f"this layer was compiled for {self.shape}; {shape} was asked for")
        return lower(
            self.fused,
            shape,
            activation,
            plain=self.plain,
            chunk=chunk,
            budget=budget,
            in_place=in_place,
            cache=cache,
        )


@dataclass(frozen=True)
class Weights:
    """What steps read. `vectors` are norms, biases and the constants of positions."""

    matrices: Mapping[str, PackedMatrix]
    vectors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        own = sum(matrix.nbytes for matrix in self.matrices.values())
        return own + sum(vector.nbytes for vector in self.vectors.values())


@dataclass(frozen=True)
class PackedLayer(Weights):
    """A layer ready to run."""

    form: Form


def metadata(form: Form) -> dict[str, str]:
    """What a packed file says about itself."""
    others = json.dumps({name: str(kind) for name, kind in form.others.items()})
    shape = "any" if form.shape is None else str(form.shape)
    values = (RECIPE, str(form.format), others, fused_json.to_text(form.fused), shape)
    return dict(zip(_KEYS, values, strict=True))


def tensor_table(
    matrices: Mapping[str, tuple[Format, int, int]],
    vectors: Mapping[str, int],
    constants: Mapping[str, int],
) -> Table:
    """Tensors of matrices [rows, columns] of any formats, fp16 vectors and float32 constants.

    The largest items come first, so that every tensor lies at a multiple of its item's size.
    """
    found: Table = {}
    for name, (kind, rows, columns) in matrices.items():
        found[f"{name}.codes"] = (torch.uint8, Layout.of(kind, rows, columns).shape)
        groups = (kind.groups(columns), rows)
        if kind.scale_dtype is not None:
            found[f"{name}.scales"] = (kind.scale_dtype, groups)
        if kind.has_zeros:
            found[f"{name}.zeros"] = (torch.uint8, groups)
    found |= {name: (torch.float16, (size,)) for name, size in vectors.items()}
    found |= {name: (torch.float32, (size,)) for name, size in constants.items()}
    order = sorted(
        found, key=lambda name: (-_item(found[name][0], name), name.rpartition(".")[2], name)
    )
    return {name: found[name] for name in order}


def _item(dtype: torch.dtype, name: str) -> int:
    # Codes are multiples of 16 bytes.
    return 16 if name.endswith(".codes") else dtype.itemsize


def load(path: Path) -> PackedLayer:
    """The packed layer in a file, memory-mapped: nothing is read before it is used.

    Raises FormatError for a file that is damaged, foreign, or of another version.
    """
    with opened(path) as file:
        form = _described(path, file.metadata() or {})
        return assembled(form, checked(path, file, form.contents.table))


def checked(path: Path, file: Any, wanted: Table) -> dict[str, Tensor]:
    """The tensors of an opened file, as its table lists them. Raises FormatError if not."""
    names = set(file.keys())
    if names != wanted.keys():
        extra = names - wanted.keys()
        # A name from a foreign file may be long, and may hold line breaks.
        name = repr(min(extra or wanted.keys() - names))[:80]
        raise FormatError(f"{path}: tensor {name} {'is unknown' if extra else 'is missing'}")
    found = {name: file.get_tensor(name) for name in names}
    for name, (dtype, shape) in wanted.items():
        tensor = found[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise FormatError(
                f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"not {dtype} {list(shape)}"
            )
    return found


def device_bytes(layer: Weights) -> int:
    """What `on_device` needs: all tensors, each aligned as a GPU's allocator would."""
    return sum(_aligned(tensor.nbytes) for tensor in _tensors(layer))


def on_device(layer: Held, block: Tensor) -> Held:
    """The same copied into `block`, uint8, of `device_bytes` at least; no kernel runs for it.

    The file's pages are read as they are copied; nothing of them is in memory besides.
    """
    end = 0

    def move(tensor: Tensor) -> Tensor:
        nonlocal end
        start, end = end, end + _aligned(tensor.nbytes)
        place = block[start : start + tensor.nbytes]
        place.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)

    matrices = {name: matrix.moved(move) for name, matrix in layer.matrices.items()}
    vectors = {name: move(vector) for name, vector in layer.vectors.items()}
    return replace(layer, matrices=matrices, vectors=vectors)


def _tensors(layer: Weights) -> Iterator[Tensor]:
    for matrix in layer.matrices.values():
        parts = (matrix.codes, matrix.scales, matrix.zeros)
        yield from (part for part in parts if part is not None)
    yield from layer.vectors.values()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, to be read. Raises FormatError, one line, where it can't be."""
    try:
        # Opening a pipe would wait for its other end.
        if path.exists() and not path.is_file():
            raise FormatError(f"{path}: not a file")
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: not a readable safetensors file: {reason}") from None


def _described(path: Path, found: Mapping[str, str]) -> Form:
    if "memladder_packed" not in found:
        raise FormatError(f"{path}: not a layer packed by memladder")
    recipe = found["memladder_packed"]
    if recipe != RECIPE:
        raise FormatError(f"{path}: packed by recipe {recipe[:20]!r}; this version reads {RECIPE}")
    if set(found) != set(_KEYS):
        raise FormatError(f"{path}: not a layer packed by memladder")
    try:
        fused = fused_json.from_text(found["layer"])
        others = {name: formats.get(spec) for name, spec in json.loads(found["formats"]).items()}
        if not fused.matrices.keys() >= others.keys():
            raise ValueError("a format of a matrix that is not there")
        shape = None if found["shape"] == "any" else Workload.parse(found["shape"])
        return Form(fused, formats.get(found["format"]), others, shape)
    except (ValueError, AttributeError, TypeError, RecursionError, UsageError, FormatError) as e:
        raise FormatError(f"{path}: its metadata is damaged: {e}") from None


def assembled(form: Form, found: Mapping[str, Tensor]) -> PackedLayer:
    """The layer of the tensors that its form's table names."""
    matrices = {
        name: packed_matrix(form.format_of(name), *sizes, name, found)
        for name, sizes in form.fused.matrices.items()
    }
    names = (*form.fused.vectors, *form.fused.constants)
    return PackedLayer(matrices, {name: found[name] for name in names}, form)


def packed_matrix(
    kind: Format, rows: int, columns: int, name: str, found: Mapping[str, Tensor]
) -> PackedMatrix:
    """A matrix of a table's tensors."""
    return PackedMatrix(
        kind,
        Layout.of(kind, rows, columns),
        found[f"{name}.codes"],
        found.get(f"{name}.scales"),
        found.get(f"{name}.zeros"),
    )
