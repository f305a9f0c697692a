"""The project's own models, compiled: once a configuration, for any shape, checkpoint and format.

A layer's outline, its ONNX graph without weights, is exported and compiled; the cache keeps the
fused layer, and which rows of which tensors its matrices and vectors are. After that neither ONNX
nor an exporter is needed any more.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memladder import models
from memladder.core import children
from memladder.core.case import Workload
from memladder.core.errors import CacheError, FormatError, GraphError, MemladderError
from memladder.core.serial import from_json, to_json
from memladder.core.text import clean
from memladder.engine.graph.fused import Parameters
from memladder.engine.packed import packing
from memladder.engine.packed.packed_layer import Form
from memladder.engine.packed.sources import CompiledLayer, Source
from memladder.engine.program import fused_json
from memladder.formats._shared.base import Format
from memladder.models import LayerConfig, cache, onnx_export, weights

# A layer that is compiled in another way is another file.
_RECIPE = "2"
# Several sequences of several tokens, so that nothing of the layer is left out.
_SHAPE = Workload(2, 65)
# float32 holds all whole numbers up to this one.
_MOST = 1 << 24


def ensure(config: LayerConfig, cache_dir: Path) -> CompiledLayer:
    """The compiled layer of a configuration, made if it is not there yet.

    Raises UnavailableError for positions that depend on the sequence's length, ConfigError and
    FormatError, one line, for a configuration that is none, CacheError where the folder can't be
    written.
    """
    models.require_fixed_positions(config)
    path = _path(config, cache_dir)

    def make(part: Path) -> None:
        outline = path.with_name(f"outline-{onnx_export.version()}.onnx")
        try:
            text = _made(config, outline, None)
        except (FormatError, GraphError) as error:
            # Some layers can be exported, or read, only if attention is spelled out.
            try:
                text = _made(config, outline, "eager")
            except (FormatError, GraphError):
                raise error from None
        part.write_text(text, encoding="utf-8")

    cache.made(path, make)
    try:
        return _read(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CacheError(f"{path} is damaged; without it, it is made again") from None


def ensure_apart(config: LayerConfig, cache_dir: Path) -> CompiledLayer:
    """The same; what has to be made is made by a process of its own, which takes the exporter and
    its 300 MiB along when it ends."""
    models.require_fixed_positions(config)
    if not cache.is_whole(_path(config, cache_dir)):
        told = json.dumps([to_json(config), str(cache_dir)])
        done = children.run(children.module(__name__), given=told)
        if done.returncode:
            lines = done.stderr.splitlines() or ["no reason was given"]
            raise FormatError(clean(lines[-1]))
    return ensure(config, cache_dir)


def ensure_packed(config: LayerConfig, kind: Format, cache_dir: Path, seed: int) -> Path:
    """The packed file of the layer of `models.weights`, made if it is not there yet.

    Raises as `ensure` does, and CacheError where the folder can't be written.
    """
    compiled = ensure(config, cache_dir)
    form = Form(compiled.fused, kind, {})
    data = weights.ensure(config, cache_dir, seed)
    path = data.with_name(packing.file_name(form))
    rows = packing.reader(lambda name: (data, name))
    return cache.made(
        path,
        lambda part: packing.pack(compiled, kind, rows, part),
        nbytes=form.nbytes,
        fits=lambda found: packing.fits(found, form),
    )


def _main() -> int:
    config, cache_dir = json.load(sys.stdin)
    try:
        ensure(from_json(LayerConfig, config), Path(cache_dir))
    except MemladderError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _path(config: LayerConfig, cache_dir: Path) -> Path:
    key = hashlib.sha256(f"{_RECIPE} {onnx_export.version()}".encode()).hexdigest()[:8]
    return cache.graph_dir(config, cache_dir) / f"layer-{key}.json"


def _made(config: LayerConfig, outline: Path, attention: str | None) -> str:
    graph, shifts = _outlined(config, attention)
    with cache.replacing(outline) as part:
        part.write_bytes(graph)
    return _compiled(outline, config, shifts)


def _outlined(config: LayerConfig, attention: str | None) -> tuple[bytes, dict[str, float]]:
    """The user's numbers go by way of libraries that have many ways to fail on senseless ones; all
    of them are one line here."""
    try:
        return onnx_export.outline(config, _SHAPE, attention)
    except MemladderError:
        raise
    except Exception as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:200]
        raise FormatError(f"this configuration's layer can't be exported: {reason}") from None


def _compiled(outline: Path, config: LayerConfig, shifts: Mapping[str, float]) -> str:
    # Not above: the process that measures reads what was compiled, and has no need of them.
    from memladder.engine.compile.fuse import fuse
    from memladder.engine.frontend import convert

    fused, parameters = fuse(convert.load(outline, _numbered(config)))
    found = {
        "layer": fused_json.to_text(fused),
        "sources": to_json(_sources(parameters, config, shifts)),
        "constants": {name: vector.tolist() for name, vector in parameters.constants.items()},
    }
    return json.dumps(found) + "\n"


def _numbered(config: LayerConfig) -> dict[str, np.ndarray]:
    """Parameters by the names of the outline, without values. Of matrices there is nothing but the
    shape. The elements of all vectors are numbered, so that a compiled layer tells which of them it
    reads."""
    found = {}
    count = 1
    for name, sizes in models.tensor_shapes(config).items():
        if len(sizes) == 2:
            array = np.broadcast_to(np.float32(0), sizes)
        else:
            array = np.arange(count, count + sizes[0], dtype=np.float32)
            count += sizes[0]
        found[onnx_export.PREFIX + name] = array
    if count > _MOST:
        raise FormatError(f"norms and biases of {count} numbers: {_MOST} are the most")
    return found


def _sources(
    parameters: Parameters, config: LayerConfig, shifts: Mapping[str, float]
) -> dict[str, Source]:
    found = {}
    for name, weight in parameters.matrices.items():
        stored = weight.array.name.removeprefix(onnx_export.PREFIX)
        found[name] = replace(Source.of(stored, weight.rows), factor=float(weight.factor))
    firsts = {
        name.removeprefix(onnx_export.PREFIX): array
        for name, array in _numbered(config).items()
        if array.ndim == 1
    }
    for name, vector in parameters.vectors.items():
        numbers = vector.astype(np.int64)
        tensor = next(t for t, known in firsts.items() if known[0] <= numbers[0] <= known[-1])
        rows = numbers - int(firsts[tensor][0])
        assert (numbers == vector).all(), f"{name} is computed"
        assert set(rows.tolist()) <= set(range(len(firsts[tensor]))), f"{name} is of two"
        found[name] = replace(Source.of(tensor, rows), shift=shifts.get(tensor, 0.0))
    _check_all_read(found.values(), config)
    return found


def _check_all_read(sources: Iterable[Source], config: LayerConfig) -> None:
    """Every row of every parameter is read, once."""
    counts = {name: np.zeros(sizes[0], int) for name, sizes in models.tensor_shapes(config).items()}
    for source in sources:
        for first, last in source.ranges:
            counts[source.tensor][first:last] += 1
    for name, count in counts.items():
        assert (count == 1).all(), f"not all of {name} is read, or some of it twice"


def _read(raw: Mapping[str, Any]) -> CompiledLayer:
    return CompiledLayer(
        fused_json.from_text(raw["layer"]),
        {name: from_json(Source, source) for name, source in raw["sources"].items()},
        {name: torch.tensor(numbers) for name, numbers in raw["constants"].items()},
    )


if __name__ == "__main__":
    sys.exit(_main())
