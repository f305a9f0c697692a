"""`memladder predict`: a case's memory, without weights or a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from memladder.cli.console import mib_text, plain_console, print_json
from memladder.cli.options import AsJson, KvFormat, ModelConfig, Sequences, whole
from memladder.core.errors import UsageError

if TYPE_CHECKING:
    from memladder.core.prediction import Prediction


def predict(
    model: ModelConfig,
    framework: Annotated[str, typer.Option(metavar="KEY|all")] = "all",
    batch_size: Sequences = "1",
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
        "batch_size": whole("batch_size", batch_size),
        "seq_len": whole("seq_len", seq_len),
        "past": whole("past", past),
        "layers": layers,
        "gpu": gpu,
        "free": free,
        "tensor_parallel": whole("tensor-parallel", tensor_parallel),
        "kv_format": kv_format,
        "version": framework_version,
        "settings": _settings(setting or []),
    }
    room = api.device(gpu, free).usable_bytes
    if framework == "all":
        answered, reasons = api.predict_all(model, **given)
        if as_json:
            print_json({"predictions": to_json(answered), "unanswered": reasons})
            return
        _show_all(answered, reasons, room)
        return
    found = api.predict(model, framework, **given)
    if as_json:
        print_json(to_json(found))
        return
    _show_one(found, room)


def _show_one(found: Prediction, room: int) -> None:
    console = plain_console()
    table = Table("category", "MiB", "known", "note", box=None)
    table.columns[1].justify = "right"
    for entry in found.ledger.entries:
        table.add_row(entry.category, mib_text(entry.nbytes), entry.known.value, entry.note or "")
    table.add_row("total", mib_text(found.total_bytes), "predicted", _interval(found))
    console.print(f"{found.id} on {_on(found)}")
    console.print(table)
    console.print(_room(found, room))
    for note in found.notes:
        console.print(f"note: {note}")


def _show_all(answered: list[Prediction], reasons: dict[str, str], room: int) -> None:
    console = plain_console()
    table = Table("framework", "MiB", "interval", "left of the GPU, MiB", "notes", box=None)
    for index in (1, 2, 3):
        table.columns[index].justify = "right"
    for found in sorted(answered, key=lambda one: one.total_bytes):
        left = "" if room >= 1 << 60 else mib_text(room - found.total_bytes)
        table.add_row(
            found.framework,
            mib_text(found.total_bytes),
            _interval(found),
            left,
            "; ".join(found.notes),
        )
    console.print(table)
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}")


def _interval(found: Prediction) -> str:
    return f"{mib_text(found.low_bytes)} to {mib_text(found.high_bytes)}"


def _on(found: Prediction) -> str:
    return f"one of {found.ranks} {found.device}" if found.ranks > 1 else found.device


def _room(found: Prediction, room: int) -> str:
    if room >= 1 << 60:
        return "memory of the host is not bounded here"
    left = room - found.total_bytes
    if left < 0:
        return f"does not fit: {mib_text(-left)} MiB more than the {mib_text(room)} there are"
    return f"{mib_text(left)} MiB of {mib_text(room)} left"


def _settings(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"setting {text[:40]!r} is not of the form NAME=VALUE")
        found[name.strip()] = value.strip()
    return found
