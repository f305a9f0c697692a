"""Cells, drawn to be read: a panel a model, a group a shape, a named row for every system.

Bars lie down so that names and values are written straight and nothing needs a colour key. All
panels share one logarithmic axis in MiB; it starts at a round number below the smallest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.core.record import Status
from memladder.reports import style
from memladder.reports.cells import Cell, Key
from memladder.reports.drawing import draw, save
from memladder.reports.page import Content, Look, Mark
from memladder.reports.scale import plain

T = TypeVar("T")

MAX_MODELS = 6
MAX_SHAPES = 24


@dataclass(frozen=True)
class Grid:
    """What a figure always has, in its order: panels, rows and groups, whether measured or not.

    `layers` says of which layers, `values` are MiB that the cells are held against, called
    `reference`.
    """

    models: tuple[str, ...]
    systems: tuple[str, ...]
    shapes: tuple[Workload, ...]
    layers: str
    values: Mapping[Key, int]
    reference: str


_LOOKS = {
    Status.MEASURED: Look.SOLID,
    Status.PLANNED: Look.HATCHED,
    Status.PREDICTED: Look.HOLLOW,
}


def draw_measured(
    cells: Mapping[Key, Cell],
    grid: Grid,
    png: Path,
    pdf: Path,
    *,
    device_label: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    custom: bool = False,
) -> None:
    """Draw measured cells beside the grid's values, as PNG and PDF.

    With `custom`, the layers are not the grid's: its values are left out, and so are its models
    and shapes that no cell has. Raises UsageError.
    """
    figure = measured_figure(
        cells, grid, device_label=device_label, subtitle=subtitle, notes=notes, custom=custom
    )
    save(figure, png, pdf)


def measured_figure(
    cells: Mapping[Key, Cell],
    grid: Grid,
    *,
    device_label: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    custom: bool = False,
) -> Figure:
    """The figure that `draw_measured` writes. Raises UsageError."""
    if not cells:
        raise UsageError("there are no records to draw")
    models = _ordered(grid.models, sorted({model for model, _, _ in cells}), keep=not custom)
    systems = _ordered(grid.systems, sorted({system for _, system, _ in cells}), keep=True)
    shapes = _ordered(grid.shapes, sorted({shape for _, _, shape in cells}), keep=not custom)
    for kind, count, limit in (
        ("models", len(models), MAX_MODELS),
        ("shapes", len(shapes), MAX_SHAPES),
    ):
        if count > limit:
            raise UsageError(f"{count} {kind} are too many for a figure; {limit} fit")
    keys = [(m, s, shape) for m in models for shape in shapes for s in systems]
    marks = {key: _mark(cells.get(key)) for key in keys}
    layers = "" if custom else grid.layers
    texts = {mark.text for mark in marks.values()}
    explained = " ".join(text for key, text in style.EXPLAINED.items() if key in texts)
    return draw(
        Content(
            title="Memory of one decoder layer (MiB): measured",
            subtitle="; ".join(filter(None, (device_label, layers, subtitle))),
            notes=(*notes, explained) if explained else tuple(notes),
            models=models,
            systems=systems,
            shapes=shapes,
            marks=marks,
            reference={} if custom else grid.values,
            reference_label=grid.reference,
            others=tuple(system for system in systems if system not in grid.systems),
        )
    )


def _ordered(known: Iterable[T], present: Iterable[T], *, keep: bool) -> tuple[T, ...]:
    """Known items in their order, then the others; with `keep` also absent ones."""
    wanted, seen = tuple(known), tuple(present)
    first = [item for item in wanted if keep or item in seen]
    return (*first, *(item for item in seen if item not in wanted))


def _mark(cell: Cell | None) -> Mark:
    if cell is None:
        return Mark(None, Look.SOLID, style.NOT_RUN)
    if cell.value is None:
        return Mark(None, Look.SOLID, cell.note)
    look = _LOOKS[cell.status]
    suffix = "" if look is Look.SOLID else f" {style.STATUS_TEXT[cell.status]}"
    return Mark(cell.value, look, plain(cell.value) + suffix)
