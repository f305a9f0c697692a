"""`memladder fit`: what fits on which GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from memladder.cli.console import plain_console, print_json
from memladder.cli.options import AsJson, KvFormat, ModelConfig, Sequences, whole

if TYPE_CHECKING:
    from memladder.predictor.fit import Fit

_GIB = 1 << 30


def fit(
    model: ModelConfig,
    gpu: Annotated[str, typer.Option(metavar="NAME,…", help='"RTX 4090", H100, 8xH100, …')],
    gpus: Annotated[str, typer.Option(metavar="N", help="GPUs of each kind in one host.")] = "1",
    batch_size: Sequences = "1",
    context: Annotated[str, typer.Option(metavar="N", help="Tokens of a sequence.")] = "4096",
    kv_format: KvFormat = "auto",
    as_json: AsJson = False,
) -> None:
    """Tell which frameworks and formats fit on which GPUs, and how far."""
    from memladder.core.serial import to_json
    from memladder.predictor import api
    from memladder.predictor.fit import summary

    rows = api.fit(
        model,
        [name for name in gpu.split(",") if name.strip()],
        gpu_count=whole("gpus", gpus),
        batch_size=whole("batch_size", batch_size),
        context=whole("context", context),
        kv_format=kv_format,
    )
    if as_json:
        print_json({"rows": to_json(rows), "summary": summary(rows)})
        return
    console = plain_console()
    console.print(_fits(rows))
    for row in rows:
        if row.reason:
            console.print(f"{row.framework} on {row.gpu}: {row.reason}")
    console.print(summary(rows))


def _fits(rows: tuple[Fit, ...]) -> Table:
    table = Table("GPU", "framework", "format", "needed GiB", "left GiB", "most context",
                  "most batch", "", box=None)  # fmt: skip
    for index in (3, 4, 5, 6):
        table.columns[index].justify = "right"
    for row in rows:
        if row.left_bytes is None or row.needed_bytes is None:
            continue
        name = f"{row.gpus}x{row.gpu}" if row.gpus > 1 else row.gpu
        said = "no" if not row.fits else "fits" if row.surely else "just"
        said = f"{row.known}: {said}" + (", least loss" if row.cheapest else "")
        style = "red" if not row.fits else "green" if row.surely else "yellow"
        table.add_row(
            name, row.framework, row.format, f"{row.needed_bytes / _GIB:.1f}",
            f"{row.left_bytes / _GIB:.1f}", f"{row.most_context:,}" if row.fits else "",
            f"{row.most_batch:,}" if row.fits else "", said, style=style,
        )  # fmt: skip
    return table
