"""Compiled layers of the project's own models, made once per cache: one program a shape, and
weights that all shapes share."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from memladder.case import Shape
from memladder.engine.compiler import bundle
from memladder.engine.compiler.compile import Options, Result, compile_file
from memladder.engine.packed_layer import tensor_table
from memladder.files import write_atomic
from memladder.models import LayerConfig, cache, onnx_export

# A program that is made in another way is another file.
_RECIPE = "1"


def ensure(
    config: LayerConfig, cache_dir: Path, shape: Shape, seed: int, options: Options
) -> tuple[Path, Path]:
    """Files of program and weights, made if they are not there yet.

    Raises GraphError where the layer can't be compiled, CacheError where the folder can't be
    written.
    """
    model = onnx_export.ensure(config, cache_dir, shape, seed)
    key = _digest([_RECIPE, model.name, str(options)])
    program = model.with_name(f"{options.engine}-{shape}-{key}.json")
    if program.exists():
        weights = model.with_name(json.loads(program.read_bytes())["weights"])
        if weights.exists():
            return program, weights
    with cache.writing(model.parent):
        found = compile_file(model, options)
        weights = model.with_name(_weights_name(found))
        if not weights.exists():
            cache.require_space(model.parent, _nbytes(found))
            with cache.replacing(weights) as part:
                bundle.pack(found.fused, found.formats, found.format, part)
        text = json.loads(bundle.program_json(found.fused, found.program, found.plan))
        write_atomic(program, json.dumps({**text, "weights": weights.name}, indent=1) + "\n")
    return program, weights


def _weights_name(found: Result) -> str:
    said = bundle.described(found.fused, found.formats, found.format)
    key = _digest([_RECIPE, json.dumps(said, sort_keys=True)])
    return f"compiled-{str(found.format).partition(':')[0]}-{key}.safetensors"


def _nbytes(found: Result) -> int:
    matrices = {
        name: (found.formats[name], len(weight.rows), weight.columns)
        for name, weight in found.fused.matrices.items()
    }
    vectors = {name: len(vector) for name, vector in found.fused.vectors.items()}
    table = tensor_table(matrices, vectors, {})
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in table.values())


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]
