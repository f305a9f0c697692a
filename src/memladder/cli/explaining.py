"""`explain`, `diff`, `check-predictions`, `seal`: ledgers of records, and predictions' errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memladder.core.errors import UsageError

if TYPE_CHECKING:
    from memladder.core.ledger import Ledger
    from memladder.core.record import Record

_BAR = 60
_MARKS = "█▓▒░▚▞▤▥▦▧▨▩"

Store = Annotated[
    Path, typer.Argument(metavar="RECORD|STORE", help="A record, a folder, or a results file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(explain)
    app.command()(diff)
    app.command("check-predictions")(check_predictions)
    app.command()(seal)


def explain(
    store: Store,
    case: Annotated[str | None, typer.Option(metavar="ID", help="Of a store, this case.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stacked bars, as .png or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell where each MiB of measured cases went; entries sum to the reading."""
    from memladder.accounting import split
    from memladder.core.serial import to_json

    records = _measured(store, case)
    ledgers = [(record.case.id, split.ledger(record)) for record in records]
    if as_json:
        _print({name: to_json(ledger) for name, ledger in ledgers})
    elif len(records) == 1:
        _one(records[0], ledgers[0][1])
    else:
        _many(ledgers)
    if picture is not None:
        from memladder.reports import ledgers as drawing

        drawing.draw(ledgers, picture)


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A record, or STORE:CASE.")],
    after: Annotated[str, typer.Argument(metavar="B")],
    as_json: AsJson = False,
) -> None:
    """Tell what changed between two records, by category, the largest first."""
    from rich.table import Table

    from memladder.accounting import diff as differing
    from memladder.core.serial import to_json

    one, two = _single(before), _single(after)
    found = differing.diff(one, two)
    if as_json:
        _print({**to_json(found), "sentence": found.sentence})
        return
    console = _console()
    console.print(found.sentence)
    table = Table("category", "A, MiB", "B, MiB", "change", "why", box=None)
    for index in (1, 2, 3):
        table.columns[index].justify = "right"
    for change in (*found.changes, found.total):
        sizes = (_mib(change.before), _mib(change.after), f"{change.nbytes / (1 << 20):+,.1f}")
        table.add_row(change.category, *sizes, change.why or "")
    console.print(table)
    for line in found.told:
        console.print(line)


def check_predictions(
    store: Store,
    sealed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Predictions made before; else made now.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold predictions against what was measured: in total, by row, by category."""
    from memladder.core.serial import to_json
    from memladder.predictor import evidence
    from memladder.reports import predictions

    records = _measured(store, None)
    digest, given = evidence.sealed(sealed) if sealed is not None else (None, None)
    compared = evidence.compare(records, given)
    if as_json:
        _print({"sealed": digest, "cells": to_json(compared)})
        return
    print(predictions.table(records, compared, digest))


def seal(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where they are written.")],
    models: Annotated[str, typer.Option(metavar="CONFIG,…")] = "llama,bloom",
    frameworks: Annotated[str, typer.Option(metavar="KEY,…|all")] = "all",
    shapes: Annotated[str, typer.Option(metavar="BxS[+P],…")] = "1x1,32x1,1x4096",
    layers: Annotated[str, typer.Option(metavar="N|all")] = "1",
    gpu: Annotated[str, typer.Option(metavar="NAME|cpu")] = "H100",
) -> None:
    """Write predictions to a file before anything is measured, and print its SHA-256."""
    from memladder import frameworks as rows
    from memladder.core.case import Workload
    from memladder.frameworks._rules.question import UnpredictableError
    from memladder.predictor import api, evidence

    if out.exists():
        raise UsageError(f"{out} is there already; what is sealed stays as it is")
    keys = rows.names() if frameworks == "all" else tuple(frameworks.split(","))
    found, reasons = [], set()
    for name in filter(None, models.split(",")):
        for key in keys:
            for text in shapes.split(","):
                load = Workload.parse(text)
                try:
                    found.append(
                        api.predict(
                            name, key, batch_size=load.batch_size, seq_len=load.seq_len,
                            past=load.past, layers=layers, gpu=gpu,
                        )
                    )  # fmt: skip
                except UnpredictableError as error:
                    reasons.add(f"{key}: {error}")
    if not found:
        raise UsageError("nothing could be predicted: " + "; ".join(sorted(reasons))[:300])
    digest = evidence.seal(out, found)
    for reason in sorted(reasons):
        print(f"not sealed: {reason}")
    print(f"{len(found)} predictions in {out}\nsha256 {digest}")


def _single(text: str) -> Record:
    """The one record of a file, or of a store's case: `results/h100.json:llama_pytorch_1_1`."""
    path, case = Path(text), None
    if not path.exists() and ":" in text:
        name, _, case = text.rpartition(":")
        path = Path(name)
    found = _measured(path, case)
    if len(found) > 1:
        raise UsageError(f"{text[:80]} holds {len(found)} records; diff takes one: STORE:CASE")
    return found[0]


def _measured(path: Path, case: str | None) -> list[Record]:
    """The measured records in a store. Raises UsageError where there is none."""
    from memladder.core.record import Status
    from memladder.sweeps import store

    contents = store.read(path)
    found = [r for r in contents.records if r.status is Status.MEASURED]
    if case is not None:
        found = [record for record in found if record.case.id == case]
    if not found:
        others = f" of {case}" if case else ""
        raise UsageError(f"{path}: no measured record{others} in {len(contents.records)} records")
    return found


def _one(record: Record, ledger: Ledger) -> None:
    from rich.table import Table

    from memladder.accounting import split

    console = _console()
    console.print(f"{record.case.id} on {record.environment.machine.device}")
    table = Table("category", "MiB", "share", "known", "note", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    for entry in ledger.entries:
        share = f"{100 * entry.nbytes / ledger.total_bytes:.1f} %"
        known = entry.known.value
        table.add_row(entry.category, _mib(entry.nbytes), share, known, entry.note or "")
    table.add_row("total", _mib(ledger.total_bytes), "", "measured", "")
    console.print(table)
    console.print(_bar(ledger))
    phases = Table("phase", "peak, MiB", "end, MiB", box=None)
    phases.columns[1].justify = phases.columns[2].justify = "right"
    for name, peak, end in split.phase_bytes(record):
        phases.add_row(name, _mib(peak), _mib(end))
    console.print(phases)


def _many(ledgers: Sequence[tuple[str, Ledger]]) -> None:
    """A row a case, in MiB, as Markdown: no width cuts it."""
    from memladder.core.ledger import CATEGORIES

    names = [n for n in CATEGORIES if any(ledger.nbytes(n) for _, ledger in ledgers)]
    print(f"| case | {' | '.join(('total', *names))} |")
    print("|---|" + "---:|" * (len(names) + 1))
    for case, ledger in ledgers:
        sizes = (ledger.total_bytes, *(ledger.nbytes(name) for name in names))
        print(f"| {case} | {' | '.join(f'{size / (1 << 20):,.0f}' for size in sizes)} |")


def _bar(ledger: Ledger) -> str:
    """A stacked bar and its key; what is thinner than a character is left out."""
    parts, key = [], []
    for index, entry in enumerate(e for e in ledger.entries if e.nbytes > 0):
        width = round(_BAR * entry.nbytes / max(ledger.total_bytes, 1))
        if width:
            mark = _MARKS[index % len(_MARKS)]
            parts.append(mark * width)
            key.append(f"{mark} {entry.category}")
    return "".join(parts) + "\n" + "  ".join(key)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"


def _print(found: object) -> None:
    print(json.dumps(found, indent=1))


def _console() -> Any:
    from memladder.cli.console import plain_console

    return plain_console()
