"""Putting the figure's content on a canvas. Places are computed in inches and points, not searched.

Nothing here touches matplotlib's global state or the reader's own matplotlib settings.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from memladder import models
from memladder.core.case import Workload
from memladder.core.files import write_atomic
from memladder.core.text import shown
from memladder.reports import style
from memladder.reports.cells import Key, system_label
from memladder.reports.page import POINTS, Content, Look, Page
from memladder.reports.scale import Scale, tick_label


def draw(content: Content) -> Figure:
    """The finished figure, on an Agg canvas."""
    with _settings():
        page = Page.of(content)
        figure = Figure(figsize=(page.width, page.height), dpi=style.DPI)
        FigureCanvasAgg(figure)
        _write_head_and_foot(figure, page, content)
        scale = Scale.fit(content.extents, page.plot_width * POINTS)
        for column, model in enumerate(content.models):
            axes = figure.add_axes(page.panel(column))
            _set_up_axes(axes, scale, page, model)
            for group, shape in enumerate(content.shapes):
                _draw_heading(axes, page, group, shape)
                for place, system in enumerate(content.systems):
                    y = page.row(group, place)
                    _draw_row(axes, scale, y, (model, system, shape), content)
        return figure


def save(figure: Figure, png: Path, pdf: Path) -> None:
    """Write the figure as PNG and PDF, equal bytes for equal content. Raises UsageError."""
    # Both are rendered before either is written: an error leaves the old pair as it was.
    with _settings():
        image = _rendered(figure, "png", {"Software": None})
        document = _rendered(figure, "pdf", {"CreationDate": None, "Title": "Memory per layer"})
    write_atomic(png, image)
    write_atomic(pdf, document)


def _rendered(figure: Figure, kind: str, metadata: dict[str, str | None]) -> bytes:
    # The lightest compression: the PNG grows by 3 %, and is encoded in half of the time.
    options: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}} if kind == "png" else {}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=style.DPI, metadata=metadata, **options)
    return buffer.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's defaults with ours on top, so that a personal matplotlibrc changes nothing.

    A dollar sign in a device's name begins no formula.
    """
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **style.RC, "text.parse_math": False}
    del settings["backend"]
    with mpl.rc_context(settings):
        yield


def _write_head_and_foot(figure: Figure, page: Page, content: Content) -> None:
    left, top = style.MARGIN / page.width, page.height - 0.2
    figure.text(
        left, top / page.height, content.title, size=style.TITLE_SIZE, weight="bold", va="top"
    )
    for number, line in enumerate(page.subtitle):
        y = (top - 0.32 - 0.18 * number) / page.height
        figure.text(left, y, shown(line), size=style.SUBTITLE_SIZE, color=style.QUIET, va="top")
    for number, line in enumerate(reversed(page.notes)):
        y = (0.2 + 0.16 * number) / page.height
        figure.text(left, y, shown(line), size=style.NOTE_SIZE, color=style.QUIET, va="bottom")
    if content.has_legend:
        handles = _legend_handles(content)
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(left, (0.2 + 0.16 * len(page.notes) + 0.04) / page.height),
            ncols=len(handles),
            frameon=False,
            fontsize=style.NOTE_SIZE,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.8,
            columnspacing=1.8,
        )


def _legend_handles(content: Content) -> list[Patch]:
    handles = [Patch(label=look.value, **_fill(look, style.QUIET)) for look in content.looks]
    if content.reference:
        handles.append(Patch(label=content.reference_label, facecolor=style.PALE, edgecolor="none"))
    return handles


def _set_up_axes(axes: Axes, scale: Scale, page: Page, model: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(scale.lower, scale.upper)
    axes.set_ylim(page.rows_high, 0)
    axes.set_title(models.title(model), loc="left", size=style.PANEL_SIZE, weight="bold")
    axes.set_xlabel("MiB (logarithmic)", size=style.TICK_SIZE, color=style.QUIET)
    ticks = scale.ticks()
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([tick_label(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(FixedLocator(scale.minor_ticks()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="both", color=style.RULE, labelsize=style.TICK_SIZE)
    axes.set_yticks([])
    axes.grid(axis="x", which="major", color=style.GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.RULE)


def _draw_heading(axes: Axes, page: Page, group: int, shape: Workload) -> None:
    start, beside = -page.name_width / page.plot_width, axes.get_yaxis_transform()
    label = f"batch {shape.batch_size} × seq {shape.seq_len}"
    y = page.heading(group)
    axes.text(
        start, y, label, transform=beside, size=style.NAME_SIZE, weight="bold", va="center_baseline"
    )
    axes.plot(
        [start, 1],
        [group * page.group_rows] * 2,
        transform=beside,
        color=style.RULE,
        lw=0.6,
        clip_on=False,
    )


def _draw_row(axes: Axes, scale: Scale, y: float, key: Key, content: Content) -> None:
    system, mark, reference = key[1], content.marks[key], content.reference.get(key)
    axes.annotate(
        system_label(system),
        (0, y),
        (-5, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        size=style.NAME_SIZE,
        ha="right",
        va="center_baseline",
    )
    # The published value is a pale bar, taller than the measured one in front of it: whichever is
    # longer, both ends can be seen, and a value is legible on it.
    if reference is not None:
        fill = {"facecolor": style.PALE, "edgecolor": "none"}
        axes.add_patch(_bar(scale, y, reference, style.PALE_HEIGHT, fill))
    end = 0.0
    if mark.value is not None:
        end = scale.points(mark.value)
        fill = _fill(mark.look, style.colour(system, content.others))
        height = style.BAR_HEIGHT if reference is None else style.BAR_HEIGHT_ON_PALE
        axes.add_patch(_bar(scale, y, mark.value, height, fill))
    axes.text(
        scale.value(end + 4),
        y,
        mark.text,
        va="center_baseline",
        size=style.VALUE_SIZE,
        color=style.QUIET if mark.value is None else style.INK,
        style="italic" if mark.value is None else "normal",
    )


def _bar(scale: Scale, y: float, value: float, height: float, fill: dict[str, Any]) -> Rectangle:
    return Rectangle((scale.lower, y - height / 2), value - scale.lower, height, **fill)


def _fill(look: Look, colour: str) -> dict[str, Any]:
    if look is Look.SOLID:
        return {"facecolor": colour, "edgecolor": "none"}
    if look is Look.HATCHED:
        return {"facecolor": "white", "edgecolor": colour, "hatch": "/////", "linewidth": 0.9}
    return {"facecolor": "white", "edgecolor": colour, "linestyle": (0, (3, 2)), "linewidth": 0.9}
