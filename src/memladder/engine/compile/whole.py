"""Packing a whole checkpoint: a layer at a time, each finished before the next is begun."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from memladder import formats, models
from memladder.core import digests
from memladder.core.errors import FormatError, UsageError
from memladder.core.files import writable_folder
from memladder.engine.compile import layers
from memladder.engine.packed import folder as folders
from memladder.engine.packed import packing, rest
from memladder.engine.packed.checkpoint import Checkpoint, CheckpointLayer, Outside
from memladder.engine.packed.folder import Index, Matrix, Options, Packed
from memladder.engine.packed.packed_layer import Contents, Form
from memladder.engine.packed.packing import MatrixReport
from memladder.engine.packed.sources import CompiledLayer
from memladder.formats._shared.base import Format
from memladder.models import LayerConfig, cache, ends

Tell = Callable[[str, int, int], None]
"""Called with what is packed, and parts of the whole model that are done, and in all."""


def pack(checkpoint: Checkpoint, options: Options, out: Path, tell: Tell) -> Index:
    """Pack what of the checkpoint is not in `out` yet; the folder's index.

    Raises UsageError for a folder that holds something else, or was begun otherwise; ConfigError,
    FormatError and GraphError for what can't be packed: before anything is written.
    """
    work = _Work(checkpoint, options)
    index = _begun(work, out)
    writable_folder(out)
    cache.require_space(out, work.missing_bytes(index), "folder", "choose an --out elsewhere")
    total = work.parameters

    def telling(name: str) -> Callable[[int], None]:
        before = sum(packed.parameters for packed in index.layers)
        return lambda part: tell(name, before + part, total)

    for number in range(len(index.layers), work.count):
        packed = work.pack_layer(number, out, telling(f"layer {number} of {work.count}"))
        index = replace(index, layers=(*index.layers, packed))
        index.save(out)
    if index.rest is None:
        found = work.pack_rest(out, telling("embeddings and head"))
        index = replace(index, rest=found, tokenizer=_copied(checkpoint.folder, out))
        index.save(out)
    return index


class _Work:
    """The files to pack, known before any is packed."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._kind = _weights(options.format)
        self._head, self._embedding = map(_weights, (options.head_format, options.embedding_format))
        self.ends = ends.find(checkpoint.raw)
        self.outside: Outside = checkpoint.outside(self.ends.tensors)
        _check_sizes(checkpoint, self.ends, self.outside.shapes)
        self._compiled: dict[str, CompiledLayer] = {}
        for layer in checkpoint.layers:
            self._compile(layer.config)
        self._kept = [self._kept_of(layer) for layer in checkpoint.layers]
        self._check_patterns()
        self.held = rest.contents(self.ends, self._embedding, self._head, self.outside.shapes)

    @property
    def count(self) -> int:
        """Layers."""
        return len(self._checkpoint.layers)

    @property
    def parameters(self) -> int:
        """Of all files."""
        own = sum(_parameters(self._form(number).contents) for number in range(self.count))
        return own + _parameters(self.held)

    def index(self) -> Index:
        """Of a folder in which nothing is packed."""
        return Index(
            folders.VERSION,
            self._checkpoint.raw,
            self._options,
            self._checkpoint.digest,
            self.ends,
            self.outside.shapes,
            self.count,
            (),
            None,
            (),
        )

    def missing_bytes(self, index: Index) -> int:
        """The bytes to be written yet."""
        todo = range(len(index.layers), self.count)
        return sum(self._form(number).nbytes for number in todo) + self.held.nbytes

    def pack_layer(self, number: int, out: Path, tell: Callable[[int], None]) -> Packed:
        """One file."""
        layer, form = self._checkpoint.layers[number], self._form(number)
        path = out / folders.layer_file(number)
        with cache.replacing(path) as part:
            reports = packing.pack(
                self._compiled[layer.config.digest],
                self._kind,
                layer.rows(),
                part,
                others=form.others,
                judge=True,
                progress=lambda done, _: tell(done),
            )
        window = models.cache_geometry(layer.config).window
        return _packed(path, form.contents, reports, window)

    def pack_rest(self, out: Path, tell: Callable[[int], None]) -> Packed:
        """The file of all else."""
        path = out / folders.REST
        with cache.replacing(path) as part:
            reports = rest.pack(
                self.ends,
                self.held,
                self.outside.rows(),
                part,
                judge=True,
                progress=lambda done, _: tell(done),
            )
        return _packed(path, self.held, reports, None)

    def _compile(self, config: LayerConfig) -> None:
        if config.digest not in self._compiled:
            self._compiled[config.digest] = layers.ensure_apart(config, cache.default_dir())

    def _form(self, number: int) -> Form:
        layer = self._checkpoint.layers[number]
        fused = self._compiled[layer.config.digest].fused
        return Form(fused, self._kind, dict.fromkeys(self._kept[number], formats.get("fp16")))

    def _kept_of(self, layer: CheckpointLayer) -> list[str]:
        """Matrices whose name fits a pattern: the engine's, the layer's, or the checkpoint's."""
        return [
            name
            for name, known in self._names(layer).items()
            if any(fnmatchcase(one, pattern) for one in known for pattern in self._options.kept)
        ]

    def _names(self, layer: CheckpointLayer) -> dict[str, tuple[str, str, str]]:
        compiled = self._compiled[layer.config.digest]
        found = {}
        for name in compiled.fused.matrices:
            tensor = compiled.sources[name].tensor
            found[name] = name, tensor, layer.places[tensor][1]
        return found

    def _check_patterns(self) -> None:
        known = [
            names for layer in self._checkpoint.layers for names in self._names(layer).values()
        ]
        for pattern in self._options.kept:
            if not any(fnmatchcase(one, pattern) for names in known for one in names):
                listed = ", ".join(f"{own} ({inner})" for own, inner, _ in known[:16])
                raise UsageError(f"no matrix is called {pattern[:80]!r}; there are: {listed}")


def _begun(work: _Work, out: Path) -> Index:
    """The index of the files in the folder already."""
    new = work.index()
    found = folders.read(out) if out.is_dir() else None
    if found is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} is in use; name a new folder, or an empty one")
        return new
    if found.options != new.options:
        raise UsageError(
            f"{out} was begun with {_told(found.options)}; go on with these, or name another folder"
        )
    if found.source != new.source:
        raise UsageError(f"{out} was begun with another checkpoint; name another folder")
    for packed in found.layers:
        digests.require(out / packed.file, packed.sha256)
    return found


def _told(options: Options) -> str:
    kept = "".join(f" --keep {pattern}" for pattern in options.kept)
    return f"--format {options.format}{kept} --head-format {options.head_format}"


def _weights(spec: str) -> Format:
    kind = formats.get(spec)
    if not kind.is_weight:
        raise FormatError(f"format {kind} is for activations, not for weights")
    return kind


def _check_sizes(
    checkpoint: Checkpoint, found: ends.Ends, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FormatError where a tensor beside the layers is not of the configuration's size."""
    matrix = (found.vocabulary, found.hidden_size)
    for name, shape in shapes.items():
        wanted: tuple[int, ...] = (found.hidden_size,)
        if name in (found.embedding, found.head):
            wanted = matrix
        elif name == found.head_bias:
            wanted = (found.vocabulary,)
        elif name == found.positions:
            wanted = (shape[0], found.hidden_size)
        if shape != wanted:
            raise FormatError(
                f"{checkpoint.folder}: tensor {name} is of shape {list(shape)}; "
                f"by config.json it is {list(wanted)}"
            )


def _packed(
    path: Path, contents: Contents, reports: tuple[MatrixReport, ...], window: int | None
) -> Packed:
    signal, noise = sum(x.signal for x in reports), sum(x.noise for x in reports)
    return Packed(
        path.name,
        path.stat().st_size,
        digests.noted(path) or digests.of(path),
        contents.nbytes,
        _parameters(contents),
        _finite(packing.decibels(signal, noise)),
        tuple(
            Matrix(
                report.name,
                str(contents.matrices[report.name][0]),
                report.rows,
                report.columns,
                report.nbytes,
                _finite(report.sqnr_db),
            )
            for report in reports
        ),
        window,
    )


def _finite(number: float) -> float | None:
    """JSON has no infinity: what lost nothing has None."""
    return number if math.isfinite(number) else None


def _parameters(contents: Contents) -> int:
    """Of matrices and vectors; constants are none."""
    matrices = sum(rows * columns for _, rows, columns in contents.matrices.values())
    return matrices + sum(contents.vectors.values())


def _copied(source: Path, out: Path) -> tuple[str, ...]:
    """The tokenizer's files, as far as there are any."""
    found = [name for name in folders.TOKENIZER if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, out / name)
    return tuple(found)
