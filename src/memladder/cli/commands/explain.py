"""`memladder explain`: where each MiB of measured cases went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from memladder.cli.console import mib_text, plain_console, print_json
from memladder.cli.options import AsJson, RecordOrStore
from memladder.cli.stores import measured
from memladder.core.record import Record

if TYPE_CHECKING:
    from memladder.core.ledger import Ledger

_BAR = 60
_MARKS = "█▓▒░▚▞▤▥▦▧▨▩"


def explain(
    store: RecordOrStore,
    case: Annotated[str | None, typer.Option(metavar="ID", help="Of a store, this case.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stacked bars, as .png or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell where each MiB of measured cases went; entries sum to the reading."""
    from memladder.accounting import split
    from memladder.core.serial import to_json

    records = measured(store, case)
    ledgers = [(record.case.id, split.ledger(record)) for record in records]
    if as_json:
        print_json({name: to_json(ledger) for name, ledger in ledgers})
    elif len(records) == 1:
        _one(records[0], ledgers[0][1])
    else:
        _many(ledgers)
    if picture is not None:
        from memladder.reports import ledgers as drawing

        drawing.draw(ledgers, picture)


def _one(record: Record, ledger: Ledger) -> None:
    from memladder.accounting import split

    console = plain_console()
    console.print(f"{record.case.id} on {record.environment.machine.device}")
    table = Table("category", "MiB", "share", "known", "note", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    for entry in ledger.entries:
        share = f"{100 * entry.nbytes / ledger.total_bytes:.1f} %"
        known = entry.known.value
        table.add_row(entry.category, mib_text(entry.nbytes), share, known, entry.note or "")
    table.add_row("total", mib_text(ledger.total_bytes), "", "measured", "")
    console.print(table)
    console.print(_bar(ledger))
    phases = Table("phase", "peak, MiB", "end, MiB", box=None)
    phases.columns[1].justify = phases.columns[2].justify = "right"
    for name, peak, end in split.phase_bytes(record):
        phases.add_row(name, mib_text(peak), mib_text(end))
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
