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
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from memladder.core import digests
from memladder.core.errors import FormatError
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import Contents, Form
from memladder.engine.packed.sources import CompiledLayer, Source
from memladder.formats._shared.base import Format, Quantised, absmax, grouped
from memladder.kernels.layout import Layout
from memladder.kernels.packed import matrix_bytes

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


def file_name(form: Form) -> str:
    """`packed-int4-….safetensors`; differs whenever what the file says of itself differs."""
    text = json.dumps(packed_layer.metadata(form), sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"packed-{str(form.format).partition(':')[0]}-{key}.safetensors"


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


def weight_loss(compiled: CompiledLayer, kind: Format, rows: Rows) -> float:
    """‖w − ŵ‖ / ‖w‖ of the matrix that loses most in the format: of the weights that `rows` reads,
    and not of a file that was packed of them."""
    return max(
        loss(kind, _read(rows, compiled.sources[name], 0, sizes[0]))
        for name, sizes in compiled.fused.matrices.items()
    )


def loss(kind: Format, values: Tensor) -> float:
    """‖x − x̂‖ / ‖x‖ of a matrix [rows, columns] in the format."""
    lost = kind.dequantise(kind.quantise(values)).sub_(values)
    return math.sqrt(_energy(lost) / _energy(values))


def pack(
    compiled: CompiledLayer,
    kind: Format,
    rows: Rows,
    path: Path,
    *,
    others: Mapping[str, Format] = MappingProxyType({}),
    judge: bool = False,
    progress: Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """Write the packed layer to `path`; with `judge` what each matrix has lost is measured too.
    `others` are formats of single matrices.

    `progress` is called with parameters done and in all. Raises FormatError, naming the tensor,
    for values that are not finite or do not fit; `path` is then half-written.
    """
    blocks = {
        name: Blocks(source.tensor, partial(_read, rows, source))
        for name, source in compiled.sources.items()
    }
    form = Form(compiled.fused, kind, others)
    return write(path, form.contents, blocks, compiled.constants, judge=judge, progress=progress)


@dataclass(frozen=True)
class Blocks:
    """Where a matrix or a vector is read: `read` gives rows start … stop; `source` is what errors
    call it."""

    source: str
    read: Callable[[int, int], Tensor]


def write(
    path: Path,
    contents: Contents,
    blocks: Mapping[str, Blocks],
    constants: Mapping[str, Tensor],
    *,
    judge: bool = False,
    progress: Progress | None = None,
) -> tuple[MatrixReport, ...]:
    """A file of these contents, and its digest beside it; `blocks` are all of its matrices and
    vectors. See `pack`."""
    total = sum(rows * columns for _, rows, columns in contents.matrices.values())
    done = 0
    reports = {}
    table = contents.table
    header, places, size = _header(contents)
    with path.open("w+b") as file:
        file.write(header)
        file.truncate(size)
        digest = digests.Digest(file.fileno())

        def put(name: str, tensor: Tensor, offset: int = 0) -> None:
            file.seek(places[name] + offset)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

        # In the order of the file, so that its digest is computed as it grows.
        for name in sorted(contents.matrices, key=lambda name: places[f"{name}.codes"]):
            kind, rows, columns = contents.matrices[name]
            matrix = blocks[name]
            layout = Layout.of(kind, rows, columns)
            offset = 0
            # Made at once: kept among each block's temporaries, small ones would split the heap.
            beside = {
                part: torch.empty(found[1], dtype=found[0])
                for part in ("scales", "zeros")
                if (found := table.get(f"{name}.{part}")) is not None
            }
            row = 0
            signal = noise = 0.0
            for values in _blocks(matrix, rows, columns, layout):
                quantised = _quantised(kind, values, matrix.source)
                stored = layout.pack(quantised.codes)
                put(f"{name}.codes", stored, offset)
                offset += stored.nbytes
                file.flush()
                digest.up_to(places[f"{name}.codes"] + offset)
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
            nbytes = matrix_bytes(kind, rows, columns)
            reports[name] = MatrixReport(name, rows, columns, nbytes, signal, noise)
        for name, length in contents.vectors.items():
            vector = blocks[name]
            put(name, _quantised_vector(vector.read(0, length), vector.source))
        for name, constant in constants.items():
            put(name, constant)
        file.flush()
        os.fsync(file.fileno())
        digest.up_to(size)
    digests.note(path, digest.hex())
    return tuple(reports[name] for name in contents.matrices)


def _header(contents: Contents) -> tuple[bytes, dict[str, int], int]:
    """The file's beginning, padded so that the data can be mapped; where each tensor begins; the
    whole file's size."""
    table: dict[str, object] = {"__metadata__": dict(contents.metadata)}
    starts = {}
    end = 0
    for name, (dtype, shape) in contents.table.items():
        starts[name], end = end, end + dtype.itemsize * math.prod(shape)
        offsets = [starts[name], end]
        table[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(table).encode()
    text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + starts[name] for name in starts}, len(header) + end


def fits(path: Path, form: Form) -> bool:
    """Is a file of that size and of that header there?"""
    header, _, size = _header(form.contents)
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def _blocks(matrix: Blocks, rows: int, columns: int, layout: Layout) -> Iterator[Tensor]:
    tiles = max(1, _BLOCK // (columns * layout.tile_rows))
    step = tiles * layout.tile_rows
    for start in range(0, rows, step):
        values = matrix.read(start, min(start + step, rows))
        if values.shape[1:] != (columns,):
            raise FormatError(
                f"{matrix.source} has rows of shape {list(values.shape[1:])}, not [{columns}]"
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
    return source.applied(values)


def _quantised(kind: Format, values: Tensor, name: str) -> Quantised:
    try:
        found = kind.quantise(values)
        _require_held(kind, values, found)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    return found


def _require_held(kind: Format, values: Tensor, found: Quantised) -> None:
    """Raise FormatError for weights that are not zero where the format has no scale that small:
    they would become zeros. A group of zeros is fine."""
    most = absmax(grouped(values, kind.group or values.shape[1])).squeeze(-1)
    if found.scales is None:
        wrong = (most > 0) & (absmax(kind.decode(found.codes)) == 0)
    else:
        scales = kind.scale_values(found.scales)
        # The largest weight is half of the largest code times the scale at the least: a quarter
        # where the scale was rounded up to the smallest that there is.
        wrong = (most > 0) & ((scales == 0) | (most < scales * (_top(kind) / 4)))
    if wrong.any():
        raise FormatError(
            f"{kind} has no {'value' if found.scales is None else 'scale'} that small: of "
            f"{int(wrong.sum())} groups the largest weight is {float(most[wrong].max()):.2g}"
        )


@lru_cache(maxsize=16)
def _top(kind: Format) -> float:
    """The largest finite magnitude that a code stands for before its scale."""
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8).view(1, -1)
    return float(kind.decode(codes).nan_to_num(0.0, 0.0, 0.0).abs().max())


def _quantised_vector(values: Tensor, name: str) -> Tensor:
    stored = values.to(torch.float16)
    if not stored.isfinite().all():
        raise FormatError(f"{name}: a value beyond 65504 does not fit into fp16")
    if values.any() and not stored.any():
        raise FormatError(f"{name}: fp16 has no value that small; all of it would be zero")
    return stored


def _energy(values: Tensor) -> float:
    """Sum of squares. A norm accumulates in float64 without a copy in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
