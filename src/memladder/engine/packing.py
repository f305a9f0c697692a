"""Quantising a layer into its packed file, block of rows by block of rows.

Neither the source nor the result is ever in memory as a whole: besides one block and its
temporaries only the scales of one matrix are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memladder.engine import packed_layer, programs
from memladder.engine.sources import Matrix, Source, Vector
from memladder.errors import FormatError, MemladderError
from memladder.formats.base import Format, Quantised
from memladder.kernels.layout import Layout
from memladder.kernels.packed import matrix_bytes
from memladder.models import LayerConfig, cache, weights

Rows = Callable[[str, int, int], Tensor]
"""Rows start … stop of a tensor of the source, by its name."""
Progress = Callable[[int, int], None]

# Elements of a block: float32 temporaries of 4 MiB, some twenty of them, which the C library keeps
# for the next one. Larger ones are no faster. A block has a tile's rows at least.
_BLOCK = 1 << 20
_ALIGNMENT = 4096
_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix. `signal` is Σw², `noise` Σ(w − ŵ)²; zero unless judged."""

    name: str
    rows: int
    columns: int
    nbytes: int
    signal: float
    noise: float

    @property
    def bits_per_weight(self) -> float:
        """Its scales and its layout's padding included."""
        return 8 * self.nbytes / (self.rows * self.columns)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise."""
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    """10 log10 signal / noise; infinite without noise.

    >>> decibels(1000.0, 1.0)
    30.0
    """
    return 10 * math.log10(signal / noise) if noise else math.inf


def ensure(config: LayerConfig, kind: Format, cache_dir: Path, seed: int) -> Path:
    """The packed file of the layer of `models.weights`, made if it is not there yet.

    Raises CacheError where the folder can't be written.
    """
    data = weights.ensure(config, cache_dir, seed)
    path = data.with_name(file_name(config, kind))
    if _is_whole(path, config, kind):
        return path
    with cache.writing(data.parent):
        if not _is_whole(path, config, kind):
            cache.require_space(data.parent, packed_layer.weight_bytes(config, kind))
            with cache.replacing(path) as part:
                pack(config, kind, reader(lambda name: (data, name)), part)
    return path


def file_name(config: LayerConfig, kind: Format) -> str:
    """`packed-int4-….safetensors`; differs whenever what the file says of itself differs."""
    text = json.dumps(packed_layer.metadata(config, kind), sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"packed-{str(kind).partition(':')[0]}-{key}.safetensors"


def reader(find: Callable[[str], tuple[Path, str]]) -> Rows:
    """Rows of safetensors files; `find` gives a tensor's file and its name there.

    A file is opened for each block, so that pages that were read do not stay mapped.
    """

    def rows(name: str, start: int, stop: int) -> Tensor:
        path, inner = find(name)
        with packed_layer.opened(path) as file:
            found: Tensor = file.get_slice(inner)[start:stop]
        return found

    return rows


def pack(
    config: LayerConfig,
    kind: Format,
    rows: Rows,
    path: Path,
    *,
    judge: bool = False,
    progress: Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """Write the packed layer to `path`; with `judge` what each matrix has lost is measured too.

    `progress` is called with parameters done and in all. Raises FormatError, naming the tensor,
    for values that are not finite or do not fit; `path` is then half-written. Raises
    UnavailableError before anything is written for positions that the engine does not have.
    """
    definition = programs.definition(config.model)
    matrices: dict[str, Matrix] = definition.matrices(config.values)
    vectors: dict[str, Vector] = definition.vectors(config.values)
    constants = _constants(config)
    return write(
        path,
        packed_layer.metadata(config, kind),
        {
            name: Blocks(
                kind,
                matrix.rows,
                matrix.columns,
                matrix.source.tensor,
                partial(_read, rows, matrix.source),
            )
            for name, matrix in matrices.items()
        },
        {
            name: Blocks(
                None, vector.size, 1, vector.source.tensor, partial(_read, rows, vector.source)
            )
            for name, vector in vectors.items()
        },
        constants,
        judge=judge,
        progress=progress,
    )


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] to be stored in `format`, or a vector [rows] (None: in fp16).

    `read` gives rows start … stop; `source` is what errors call it.
    """

    format: Format | None
    rows: int
    columns: int
    source: str
    read: Callable[[int, int], Tensor]


def write(
    path: Path,
    metadata: Mapping[str, str],
    matrices: Mapping[str, Blocks],
    vectors: Mapping[str, Blocks],
    constants: Mapping[str, Tensor],
    *,
    judge: bool = False,
    progress: Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """A file of matrices in their formats, fp16 vectors and float32 constants; see `pack`."""
    total = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    done = 0
    reports = []
    table = packed_layer.tensor_table(
        {name: (_format(m), m.rows, m.columns) for name, m in matrices.items()},
        {name: vector.rows for name, vector in vectors.items()},
        {name: len(constant) for name, constant in constants.items()},
    )
    header, places, size = _header(metadata, table)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)

        def put(name: str, tensor: Tensor, offset: int = 0) -> None:
            file.seek(places[name] + offset)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

        for name, matrix in matrices.items():
            kind = _format(matrix)
            layout = Layout.of(kind, matrix.rows, matrix.columns)
            offset = 0
            # Made at once: kept among each block's temporaries, small ones would split the heap.
            beside = {
                part: torch.empty(found[1], dtype=found[0])
                for part in ("scales", "zeros")
                if (found := table.get(f"{name}.{part}")) is not None
            }
            row = 0
            signal = noise = 0.0
            for values in _blocks(matrix, layout):
                quantised = _quantised(kind, values, matrix.source)
                stored = layout.pack(quantised.codes)
                put(f"{name}.codes", stored, offset)
                offset += stored.nbytes
                for part, groups in beside.items():
                    groups[:, row : row + len(values)] = getattr(quantised, part).t()
                row += len(values)
                if judge:
                    lost = kind.dequantise(quantised).sub_(values)
                    signal += _energy(values)
                    noise += _energy(lost)
                done += values.numel()
                if progress is not None:
                    progress(done, total)
            for part, groups in beside.items():
                put(f"{name}.{part}", groups)
            nbytes = matrix_bytes(kind, matrix.rows, matrix.columns)
            reports.append(MatrixReport(name, matrix.rows, matrix.columns, nbytes, signal, noise))
        for name, vector in vectors.items():
            put(name, _quantised_vector(vector.read(0, vector.rows), vector.source))
        for name, constant in constants.items():
            put(name, constant)
        file.flush()
        os.fsync(file.fileno())
    return tuple(reports)


def _format(matrix: Blocks) -> Format:
    assert matrix.format is not None
    return matrix.format


def _header(
    metadata: Mapping[str, str], tensors: packed_layer.Table
) -> tuple[bytes, dict[str, int], int]:
    """The file's beginning, padded so that the data can be mapped; where each tensor begins; the
    whole file's size."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    starts = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + dtype.itemsize * math.prod(shape)
        offsets = [starts[name], end]
        table[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(table).encode()
    text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + starts[name] for name in starts}, len(header) + end


def _is_whole(path: Path, config: LayerConfig, kind: Format) -> bool:
    """Is a file of that size and of that header there?"""
    metadata, table = packed_layer.metadata(config, kind), packed_layer.table(config, kind)
    header, _, size = _header(metadata, table)
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def _blocks(matrix: Blocks, layout: Layout) -> Iterator[Tensor]:
    tiles = max(1, _BLOCK // (matrix.columns * layout.tile_rows))
    step = tiles * layout.tile_rows
    for start in range(0, matrix.rows, step):
        values = matrix.read(start, min(start + step, matrix.rows))
        if values.shape[1:] != (matrix.columns,):
            raise FormatError(
                f"{matrix.source} has rows of shape {list(values.shape[1:])}, "
                f"not [{matrix.columns}]"
            )
        yield values


def _read(rows: Rows, source: Source, start: int, stop: int) -> Tensor:
    parts = [rows(source.tensor, *run) for run in source.runs(start, stop)]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise FormatError(f"{source.tensor} is {values.dtype}; float16, bfloat16 or float32 wanted")
    if values.shape[0] != stop - start:
        raise FormatError(f"{source.tensor} has too few rows: {stop} are wanted")
    if not values.isfinite().all():
        raise FormatError(f"{source.tensor} holds NaN or infinity in rows {start} to {stop - 1}")
    return values


def _quantised(kind: Format, values: Tensor, name: str) -> Quantised:
    try:
        return kind.quantise(values)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def _quantised_vector(values: Tensor, name: str) -> Tensor:
    stored = values.to(torch.float16)
    if not stored.isfinite().all():
        raise FormatError(f"{name}: a value beyond 65504 does not fit into fp16")
    return stored


def _energy(values: Tensor) -> float:
    """Sum of squares. A norm accumulates in float64 without a copy in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _constants(config: LayerConfig) -> dict[str, Tensor]:
    """Constants of the layer's positions. They come from the user's numbers by way of another
    library, which has many ways to fail on senseless ones; all of them are one line here."""
    try:
        found: dict[str, Tensor] = programs.definition(config.model).constants(config.values)
    except MemladderError:
        raise
    except Exception as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:200]
        raise FormatError(f"positions of this configuration can't be made: {reason}") from None
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise FormatError(f"{name} of this configuration is not finite")
    return found
