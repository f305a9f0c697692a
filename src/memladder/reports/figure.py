"""Figure 11, drawn to be read: a panel a model, a group a shape, a named row for every system.

Bars lie down so that names and values are written straight and nothing needs a colour key. All
panels share one logarithmic axis in MiB; it starts at a round number below the smallest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from memladder.core.case import FIGURE_MODELS, FIGURE_SHAPES, FIGURE_SYSTEMS, Case
from memladder.core.errors import UsageError
from memladder.core.record import Status
from memladder.paper.published import published
from memladder.reports import style
from memladder.reports.cells import Cell, Key
from memladder.reports.drawing import draw, save
from memladder.reports.page import Content, Look, Mark
from memladder.reports.scale import plain

T = TypeVar("T")

MAX_MODELS = 6
MAX_SHAPES = 24
PAPER_LAYERS = (
    "LLaMA-2-70B and BLOOM-176B; fp16 unless a system's name says otherwise; "
    "no key-value cache from earlier tokens"
)

_LOOKS = {
    Status.MEASURED: Look.SOLID,
    Status.PLANNED: Look.HATCHED,
    Status.PREDICTED: Look.HOLLOW,
}


def draw_published(png: Path, pdf: Path) -> None:
    """Draw the paper's figure from its published values. Raises UsageError."""
    save(published_figure(), png, pdf)


def draw_measured(
    cells: Mapping[Key, Cell],
    png: Path,
    pdf: Path,
    *,
    device_label: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    custom: bool = False,
) -> None:
    """Draw measured cells beside the published values, as PNG and PDF.

    With `custom`, the layers are not the paper's: its values are left out, and so are its models
    and shapes that no cell has. Raises UsageError.
    """
    figure = measured_figure(
        cells, device_label=device_label, subtitle=subtitle, notes=notes, custom=custom
    )
    save(figure, png, pdf)


def published_figure() -> Figure:
    """The figure that `draw_published` writes."""
    marks = {key: Mark(value, Look.SOLID, str(value)) for key, value in _published_values().items()}
    return draw(
        Content(
            title="Memory of one decoder layer (MiB): published (A100)",
            subtitle=f"{published().device}; {PAPER_LAYERS}",
            notes=(
                "Source: the values published for Figure 11 of the OSDI'24 paper on Ladder (2024). "
                "Memory in use on the whole device in steady state, CUDA context included.",
            ),
            models=tuple(FIGURE_MODELS),
            systems=tuple(FIGURE_SYSTEMS),
            shapes=FIGURE_SHAPES,
            marks=marks,
            reference={},
        )
    )


def measured_figure(
    cells: Mapping[Key, Cell],
    *,
    device_label: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    custom: bool = False,
) -> Figure:
    """The figure that `draw_measured` writes. Raises UsageError."""
    if not cells:
        raise UsageError("there are no records to draw")
    models = _ordered(FIGURE_MODELS, sorted({model for model, _, _ in cells}), keep=not custom)
    systems = _ordered(FIGURE_SYSTEMS, sorted({system for _, system, _ in cells}), keep=True)
    shapes = _ordered(FIGURE_SHAPES, sorted({shape for _, _, shape in cells}), keep=not custom)
    for kind, count, limit in (
        ("models", len(models), MAX_MODELS),
        ("shapes", len(shapes), MAX_SHAPES),
    ):
        if count > limit:
            raise UsageError(f"{count} {kind} are too many for a figure; {limit} fit")
    keys = [(m, s, shape) for m in models for shape in shapes for s in systems]
    marks = {key: _mark(cells.get(key)) for key in keys}
    layers = "" if custom else PAPER_LAYERS
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
            reference={} if custom else _published_values(),
        )
    )


def _published_values() -> dict[Key, int]:
    values = published().values
    return {
        (model, system, shape): values[Case(model, system, shape, "cpu").id]
        for model in FIGURE_MODELS
        for shape in FIGURE_SHAPES
        for system in FIGURE_SYSTEMS
    }


def _ordered(known: Iterable[T], present: Iterable[T], *, keep: bool) -> tuple[T, ...]:
    """The paper's items in its order, then the others; with `keep` also those not present."""
    paper, seen = tuple(known), tuple(present)
    first = [item for item in paper if keep or item in seen]
    return (*first, *(item for item in seen if item not in paper))


def _mark(cell: Cell | None) -> Mark:
    if cell is None:
        return Mark(None, Look.SOLID, style.NOT_RUN)
    if cell.value is None:
        return Mark(None, Look.SOLID, cell.note)
    look = _LOOKS[cell.status]
    suffix = "" if look is Look.SOLID else f" {style.STATUS_TEXT[cell.status]}"
    return Mark(cell.value, look, plain(cell.value) + suffix)
