"""The figure and its table, drawn from records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from memladder import models
from memladder.core.files import writable_folder, write_atomic
from memladder.core.record import Record
from memladder.core.verification import Verification


def draw(
    records: Sequence[Record], verifications: Sequence[Verification], output_dir: Path
) -> None:
    """Draw the figure of one device's records and write its table; print where they are."""
    from memladder.paper import figure11
    from memladder.paper.published import published
    from memladder.reports import cells, figure, table

    found = cells.cells_from(records, verifications)
    is_custom = custom(records)
    page = table.to_markdown_report(records, verifications, {} if is_custom else published().values)
    png, pdf = pictures(output_dir, _slug(records))
    figure.draw_measured(
        found,
        figure11.grid(),
        png,
        pdf,
        device_label=cells.device_label(records),
        subtitle=_layers(records) if is_custom else "",
        notes=cells.notes_from(records),
        custom=is_custom,
    )
    write_atomic(png.with_suffix(".md"), page)
    print(f"{png}\n{pdf}\n{png.with_suffix('.md')}")


def _layers(records: Iterable[Record]) -> str:
    """Which layers were measured, where they are not the figure's."""
    found = {
        record.case.model: f"{models.title(record.case.model)} layer of "
        f"{record.layer.parameters:,} parameters, "
        f"hidden size {record.layer.config.get('hidden_size', 'unknown')}"
        for record in records
        if record.layer is not None
    }
    return "; ".join(found.values())


def custom(records: Iterable[Record]) -> bool:
    """Is any layer another than the figure's, so that the published values say nothing of it?"""
    return any(
        record.layer is not None
        and (
            record.case.model not in models.names()
            or record.layer.digest != models.layer_config(record.case.model).digest
        )
        for record in records
    )


def pictures(output_dir: Path, slug: str) -> tuple[Path, Path]:
    """Where a figure goes, as PNG and as PDF; both folders can be written to."""
    names = tuple(output_dir / kind / f"memory_usage_{slug}.{kind}" for kind in ("png", "pdf"))
    for name in names:
        writable_folder(name.parent)
    return names[0], names[1]


def _slug(records: Sequence[Record]) -> str:
    """A device's short name for files: `h100`, `cpu`; the published figure's name stays its own."""
    from memladder.reports import cells

    shown = cells.representative(records)
    if shown.case.device == "cpu":
        return "cpu"
    name = shown.environment.machine.device.lower().replace("nvidia", "")
    model = re.search(r"[a-z]*\d+[a-z]*", name.replace("geforce", "").replace("rtx ", "rtx"))
    slug = model[0] if model else re.sub(r"\W+", "_", name).strip("_")
    return "a100_measured" if slug == "a100" else slug
