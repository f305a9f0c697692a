"""`memladder quantize`: a layer of a checkpoint, packed; what it takes and loses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from memladder import models
from memladder.cli.commands.quantize_all import quantize_all
from memladder.cli.console import plain_console
from memladder.cli.ending import needed
from memladder.cli.options import MAX_LAYER, count
from memladder.cli.terminal import progress_bar
from memladder.core import digests
from memladder.core.errors import FormatError, UsageError
from memladder.core.files import writable_folder, write_atomic
from memladder.core.units import mib
from memladder.models import cache
from memladder.reports.printing import add_numbers, print_table

if TYPE_CHECKING:
    from memladder.engine.packed.packing import MatrixReport


def quantize(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A folder with config.json and safetensors."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the packed file is written.")
    ],
    layer: Annotated[str, typer.Option(metavar="N", help="Which decoder layer, from 0.")] = "0",
    whole: Annotated[
        bool, typer.Option("--all", help="All layers, embeddings and head: a model that runs.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="With --all: matrices that stay in fp16."),
    ] = None,
    head_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="With --all: of the head, and of tied embeddings.")
    ] = "fp16",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="int4, nf4, mxfp4, … and parameters: int4:group_size=64.",
        ),
    ] = "int4",
) -> None:
    """Pack a layer of a local checkpoint in a number format, or all of it."""
    if whole:
        kept = tuple(keep or ())
        quantize_all(checkpoint, out, form=form, kept=kept, head_format=head_format)
        return
    if keep or head_format != "fp16":
        raise UsageError("--keep and --head-format are for --all")

    _quantize(checkpoint, count("layer", layer, MAX_LAYER, least=0), form, out)


def _quantize(folder: Path, number: int, text: str, out: Path) -> None:
    """Pack a checkpoint's layer in a format; print, and keep, what each matrix takes and loses."""
    # transformers has more to say about positions than the one line of an error.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with needed("quantize", "ladder"):
        from memladder import formats
        from memladder.engine.compile import layers
        from memladder.engine.packed import checkpoint, packing
        from memladder.engine.packed.packed_layer import Form

    kind = formats.get(text)
    if not kind.is_weight:
        raise FormatError(f"format {kind} is for activations, not for weights")
    layer = checkpoint.open_layer(folder, number)
    config = layer.config
    key = str(kind).partition(":")[0]
    path = out / f"{config.model}-layer{number}-{key}.safetensors"
    summary = path.with_suffix(".json")
    writable_folder(out)
    for name in (path, summary):
        _refuse_existing(name)
    with needed("quantize", "ladder"):
        compiled = layers.ensure_apart(config, cache.default_dir())
    nbytes = Form(compiled.fused, kind, {}).nbytes
    cache.require_space(out, nbytes, "folder", "choose an --out on a larger disk")
    try:
        with _new_file(path) as part, progress_bar(f"{config.model} layer {number}") as progress:
            reports = packing.pack(
                compiled, kind, layer.rows(), part, judge=True, progress=progress
            )
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    signal, noise = sum(x.signal for x in reports), sum(x.noise for x in reports)
    parameters = models.parameters(config)
    found = {
        "model": config.model,
        "layer": number,
        "format": str(kind),
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "parameters": parameters,
        "matrices": [_matrix(report) for report in reports],
        # Norms, biases and positions, which are kept as they are.
        "vectors": {"bytes": nbytes - sum(report.nbytes for report in reports)},
        "total": {
            "bytes": nbytes,
            "bits_per_weight": 8 * nbytes / parameters,
            "sqnr_db": _finite(packing.decibels(signal, noise)),
        },
    }
    try:
        write_atomic(summary, json.dumps(found, indent=1, allow_nan=False) + "\n")
    except BaseException:
        path.unlink()
        digests.beside(path).unlink(missing_ok=True)
        raise
    print_table(plain_console(), _quantised_table(found))
    print(f"{path}\n{summary}")


def _matrix(report: MatrixReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "rows": report.rows,
        "columns": report.columns,
        "bytes": report.nbytes,
        "bits_per_weight": report.bits_per_weight,
        "sqnr_db": _finite(report.sqnr_db),
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity: what lost nothing has None."""
    return number if math.isfinite(number) else None


def _quantised_table(found: Mapping[str, Any]) -> Table:
    table = Table("matrix", Column("shape", no_wrap=True))
    add_numbers(table, "MiB", "bits/weight", "SQNR dB")

    def add(name: str, shape: str, row: Mapping[str, Any]) -> None:
        sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        table.add_row(name, shape, _mib(row), f"{row['bits_per_weight']:.3f}", sqnr)

    for row in found["matrices"]:
        add(row["name"], f"{row['rows']} × {row['columns']}", row)
    table.add_row("vectors", "", _mib(found["vectors"]), end_section=True)
    add("total", "", found["total"])
    return table


def _mib(row: Mapping[str, Any]) -> str:
    return f"{mib(row['bytes']):,.3f}"


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} is there already; remove it, or choose another --out")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when all went well, and is removed otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        yield part
        # Another process may have been quicker.
        _refuse_existing(path)
        digests.moved(part, path)
    finally:
        part.unlink(missing_ok=True)
        digests.beside(part).unlink(missing_ok=True)
