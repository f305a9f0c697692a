"""A layer packed in a number format, as one safetensors file that says all about itself.

For every matrix `<name>.codes`, `<name>.scales`, `<name>.zeros` as in `kernels.packed`, for every
norm and bias an fp16 vector, for positions a float32 constant. The metadata holds the format with
its parameters and the layer's configuration; what the file must contain follows from these two.
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

from memladder import formats, models
from memladder.engine import programs
from memladder.engine.plan import ALIGNMENT
from memladder.errors import ConfigError, FormatError, UsageError
from memladder.formats.base import Format
from memladder.kernels.layout import Layout
from memladder.kernels.packed import PackedMatrix
from memladder.models import LayerConfig

# Part of the metadata: a file in another order is another file.
RECIPE = "2"
_KEYS = ("memladder_packed", "format", "model", "config")

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Weights:
    """What a program reads by name. `vectors` are norms, biases and the constants of positions.

    `format` is that of all matrices but those that were asked to be kept.
    """

    format: Format
    matrices: dict[str, PackedMatrix]
    vectors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        own = sum(matrix.nbytes for matrix in self.matrices.values())
        return own + sum(vector.nbytes for vector in self.vectors.values())


@dataclass(frozen=True)
class PackedLayer(Weights):
    """A layer ready to run, and the configuration that says what it is."""

    config: LayerConfig


AnyWeights = TypeVar("AnyWeights", bound=Weights)


def metadata(config: LayerConfig, kind: Format) -> dict[str, str]:
    """What a packed file says about itself."""
    values = json.dumps(config.values, sort_keys=True)
    return dict(zip(_KEYS, (RECIPE, str(kind), config.model, values), strict=True))


def table(config: LayerConfig, kind: Format) -> Table:
    """Names, dtypes and shapes of a packed file's tensors, in the order in which they lie there.

    The largest items come first, so that every tensor lies at a multiple of its item's size.
    """
    definition = programs.definition(config.model)
    return tensor_table(
        {
            name: (kind, matrix.rows, matrix.columns)
            for name, matrix in definition.matrices(config.values).items()
        },
        {name: vector.size for name, vector in definition.vectors(config.values).items()},
        definition.constant_sizes(config.values),
    )


def tensor_table(
    matrices: Mapping[str, tuple[Format, int, int]],
    vectors: Mapping[str, int],
    constants: Mapping[str, int],
) -> Table:
    """The same for matrices [rows, columns] of any formats, fp16 vectors and float32 constants."""
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


def weight_bytes(config: LayerConfig, kind: Format) -> int:
    """Bytes of a packed layer: all tensors of its table."""
    return sum(
        dtype.itemsize * torch.Size(shape).numel() for dtype, shape in table(config, kind).values()
    )


def load(path: Path) -> PackedLayer:
    """The packed layer in a file, memory-mapped: nothing is read before it is used.

    Raises FormatError for a file that is damaged, foreign, or of another version.
    """
    with opened(path) as file:
        config, kind = _described(path, file.metadata() or {})
        found = checked(path, file, table(config, kind))
    return assembled(config, kind, found)


def checked(path: Path, file: Any, wanted: Table) -> dict[str, Tensor]:
    """The tensors of an opened file, if they are those of the table. Raises FormatError if not."""
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


def on_device(layer: AnyWeights, block: Tensor) -> AnyWeights:
    """The layer copied into `block`, uint8, of `device_bytes` at least; no kernel runs for it.

    The file's pages are read as they are copied; nothing of the layer is in memory besides.
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


def _described(path: Path, found: dict[str, str]) -> tuple[LayerConfig, Format]:
    if set(found) != set(_KEYS):
        raise FormatError(f"{path}: not a layer packed by memladder")
    recipe, spec, model, values = (found[key] for key in _KEYS)
    if recipe != RECIPE:
        raise FormatError(f"{path}: packed by recipe {recipe[:20]!r}; this version reads {RECIPE}")
    try:
        config = LayerConfig(model, models.definition(model).read(json.loads(values)))
        return config, formats.get(spec)
    except (
        *(ValueError, AttributeError, RecursionError),
        *(UsageError, ConfigError, FormatError),
    ) as error:
        raise FormatError(f"{path}: its metadata is damaged: {error}") from None


def assembled(config: LayerConfig, kind: Format, found: dict[str, Tensor]) -> PackedLayer:
    """The layer of the tensors that its `table` names."""
    definition = programs.definition(config.model)
    matrices = {
        name: packed_matrix(kind, matrix.rows, matrix.columns, name, found)
        for name, matrix in definition.matrices(config.values).items()
    }
    names = (*definition.vectors(config.values), *definition.constant_sizes(config.values))
    return PackedLayer(kind, matrices, {name: found[name] for name in names}, config)


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
