"""`memladder figure`: Figure 11, published or from records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from memladder.cli.drawing import draw, pictures
from memladder.cli.options import HERE, OutputDir
from memladder.cli.stores import read_store
from memladder.core.errors import UsageError
from memladder.core.record import Record


def figure(
    store: Annotated[
        Path | None, typer.Argument(metavar="[STORE]", help="Records to draw; default: published.")
    ] = None,
    output_dir: OutputDir = HERE,
) -> None:
    """Draw Figure 11: published, or from the records in STORE."""
    if store is None:
        _draw_published(output_dir)
    else:
        _draw_store(store, output_dir)


def _draw_published(output_dir: Path) -> None:
    """Draw the published figure as `png/` and `pdf/memory_usage_a100.*`."""
    from memladder.paper import figure11

    png, pdf = pictures(output_dir, "a100")
    figure11.draw_published(png, pdf)
    print(f"{png}\n{pdf}")


def _draw_store(path: Path, output_dir: Path) -> None:
    """Draw the measured figure and its table from a store: one for each device in it."""
    contents = read_store(path)
    if not contents.records:
        raise UsageError(f"{path} holds no records")
    for device, records in _by_device(contents.records).items():
        checks = [item for item in contents.verifications if item.device == device]
        draw(records, checks, output_dir)


def _by_device(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What one figure can show, in the records' order: a device's records, and every plan, which is
    of its target wherever it was made; of two of a case, the one made on the device."""
    plans = [record for record in records if record.plan is not None]
    ran = [record for record in records if record.plan is None]
    found = {}
    for device in dict.fromkeys(record.case.device for record in ran or plans[:1]):
        last = sorted(plans, key=lambda plan: plan.case.device == device)
        shown = {record.case.id: record for record in last}
        found[device] = [
            record
            for record in records
            if (record.case.device == device if record.plan is None else record in shown.values())
        ]
    return found
