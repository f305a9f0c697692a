"""Figure 11 of the Ladder paper (OSDI'24): its published values, drawn."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from memladder.core.case import Case
from memladder.paper.published import published
from memladder.paper.rows import MODELS, SHAPES, SYSTEMS
from memladder.reports.cells import Key
from memladder.reports.drawing import draw, save
from memladder.reports.figure import Grid
from memladder.reports.page import Content, Look, Mark

_LAYERS = (
    "LLaMA-2-70B and BLOOM-176B; fp16 unless a system's name says otherwise; "
    "no key-value cache from earlier tokens"
)


def grid() -> Grid:
    """What the figure always shows."""
    return Grid(
        models=tuple(MODELS),
        systems=tuple(SYSTEMS),
        shapes=SHAPES,
        layers=_LAYERS,
        values=_published_values(),
        reference="published (A100)",
    )


def draw_published(png: Path, pdf: Path) -> None:
    """Draw the paper's figure from its published values. Raises UsageError."""
    save(published_figure(), png, pdf)


def published_figure() -> Figure:
    """The figure that `draw_published` writes."""
    marks = {key: Mark(value, Look.SOLID, str(value)) for key, value in _published_values().items()}
    return draw(
        Content(
            title="Memory of one decoder layer (MiB): published (A100)",
            subtitle=f"{published().device}; {_LAYERS}",
            notes=(
                "Source: the values published for Figure 11 of the OSDI'24 paper on Ladder (2024). "
                "Memory in use on the whole device in steady state, CUDA context included.",
            ),
            models=tuple(MODELS),
            systems=tuple(SYSTEMS),
            shapes=SHAPES,
            marks=marks,
            reference={},
        )
    )


def _published_values() -> dict[Key, int]:
    values = published().values
    return {
        (model, system, shape): values[Case(model, system, shape, "cpu").id]
        for model in MODELS
        for shape in SHAPES
        for system in SYSTEMS
    }
