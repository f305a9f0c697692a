"""`predict` and `fit`: options, and how answers are shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memladder.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from memladder.core.prediction import Prediction
    from memladder.predictor.fit import Fit

_GIB = 1 << 30

Model = Annotated[
    str,
    typer.Option("--model", metavar="CONFIG", help="A config.json or its folder; llama, bloom."),
]
BatchSize = Annotated[str, typer.Option("--batch_size", "--batch-size", metavar="N")]
KvFormat = Annotated[
    str, typer.Option("--kv-format", metavar="FORMAT", help="Of keys and values: fp8, q8_0, …")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(predict)
    app.command()(fit)


def predict(
    model: Model,
    framework: Annotated[str, typer.Option(metavar="KEY|all")] = "all",
    batch_size: BatchSize = "1",
    seq_len: Annotated[str, typer.Option("--seq_len", "--seq-len", metavar="N")] = "1",
    past: Annotated[str, typer.Option(metavar="N", help="Tokens in the cache already.")] = "0",
    layers: Annotated[str, typer.Option(metavar="N|all")] = "1",
    gpu: Annotated[str | None, typer.Option(metavar="NAME|cpu", help="Default: H100.")] = None,
    free: Annotated[
        str | None, typer.Option(metavar="SIZE", help="18GiB, instead of a GPU.")
    ] = None,
    tensor_parallel: Annotated[str, typer.Option("--tensor-parallel", metavar="N")] = "1",
    kv_format: KvFormat = "auto",
    framework_version: Annotated[str | None, typer.Option(metavar="VERSION")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A framework's own; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a case's memory by category, without weights or a GPU."""
    from memladder.core.serial import to_json
    from memladder.predictor import api

    given: dict[str, Any] = {
        "batch_size": _whole("batch_size", batch_size),
        "seq_len": _whole("seq_len", seq_len),
        "past": _whole("past", past),
        "layers": layers,
        "gpu": gpu,
        "free": free,
        "tensor_parallel": _whole("tensor-parallel", tensor_parallel),
        "kv_format": kv_format,
        "version": framework_version,
        "settings": _settings(setting or []),
    }
    room = api.device(gpu, free).usable_bytes
    if framework == "all":
        answered, reasons = api.predict_all(model, **given)
        if as_json:
            _print({"predictions": to_json(answered), "unanswered": reasons})
            return
        _show_all(answered, reasons, room)
        return
    found = api.predict(model, framework, **given)
    if as_json:
        _print(to_json(found))
        return
    _show_one(found, room)


def fit(
    model: Model,
    gpu: Annotated[str, typer.Option(metavar="NAME,…", help='"RTX 4090", H100, 8xH100, …')],
    gpus: Annotated[str, typer.Option(metavar="N", help="GPUs of each kind in one host.")] = "1",
    batch_size: BatchSize = "1",
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
        gpu_count=_whole("gpus", gpus),
        batch_size=_whole("batch_size", batch_size),
        context=_whole("context", context),
        kv_format=kv_format,
    )
    if as_json:
        _print({"rows": to_json(rows), "summary": summary(rows)})
        return
    console = _console()
    console.print(_fits(rows))
    for row in rows:
        if row.reason:
            console.print(f"{row.framework} on {row.gpu}: {row.reason}")
    console.print(summary(rows))


def _show_one(found: Prediction, room: int) -> None:
    from rich.table import Table

    console = _console()
    table = Table("category", "MiB", "known", "note", box=None)
    table.columns[1].justify = "right"
    for entry in found.ledger.entries:
        table.add_row(entry.category, _mib(entry.nbytes), entry.known.value, entry.note or "")
    table.add_row("total", _mib(found.total_bytes), "predicted", _interval(found))
    console.print(f"{found.id} on {_on(found)}")
    console.print(table)
    console.print(_room(found, room))
    for note in found.notes:
        console.print(f"note: {note}")


def _show_all(answered: list[Prediction], reasons: dict[str, str], room: int) -> None:
    from rich.table import Table

    console = _console()
    table = Table("framework", "MiB", "interval", "left of the GPU, MiB", "notes", box=None)
    for index in (1, 2, 3):
        table.columns[index].justify = "right"
    for found in sorted(answered, key=lambda one: one.total_bytes):
        left = "" if room >= 1 << 60 else _mib(room - found.total_bytes)
        table.add_row(
            found.framework, _mib(found.total_bytes), _interval(found), left, "; ".join(found.notes)
        )
    console.print(table)
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}")


def _fits(rows: tuple[Fit, ...]) -> Table:
    from rich.table import Table

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


def _interval(found: Prediction) -> str:
    return f"{_mib(found.low_bytes)} to {_mib(found.high_bytes)}"


def _on(found: Prediction) -> str:
    return f"one of {found.ranks} {found.device}" if found.ranks > 1 else found.device


def _room(found: Prediction, room: int) -> str:
    if room >= 1 << 60:
        return "memory of the host is not bounded here"
    left = room - found.total_bytes
    if left < 0:
        return f"does not fit: {_mib(-left)} MiB more than the {_mib(room)} there are"
    return f"{_mib(left)} MiB of {_mib(room)} left"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"


def _settings(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"setting {text[:40]!r} is not of the form NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def _whole(name: str, text: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
        raise UsageError(f"{name} {text[:40]!r} is not a whole number")
    return int(digits)


def _print(found: object) -> None:
    print(json.dumps(found, indent=1))


def _console() -> Any:
    from memladder.cli.console import plain_console

    return plain_console()
