"""What the figure says and where it goes: content first, then a page's sizes in inches."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from memladder.core.case import Workload
from memladder.reports import style
from memladder.reports.cells import Key, system_label

POINTS = 72.0
"""Points in an inch."""


class Look(Enum):
    """How a bar is filled, and what the legend calls it."""

    SOLID = "measured"
    HATCHED = "planned by a compiler, not run"
    HOLLOW = "predicted, not run"


@dataclass(frozen=True)
class Mark:
    """What stands in a row: a bar if there is a value (MiB), and the text behind it or instead."""

    value: float | None
    look: Look
    text: str


@dataclass(frozen=True)
class Content:
    """Everything that is drawn, before it has a place.

    `reference` are MiB that the marks are held against, and `reference_label` their name;
    `others` the systems that are drawn beside the grid's own.
    """

    title: str
    subtitle: str
    notes: tuple[str, ...]
    models: tuple[str, ...]
    systems: tuple[str, ...]
    shapes: tuple[Workload, ...]
    marks: Mapping[Key, Mark]
    reference: Mapping[Key, int]
    reference_label: str = ""
    others: tuple[str, ...] = ()

    @property
    def extents(self) -> list[tuple[float, float]]:
        """Each value that the axis must hold, with the points that its text takes behind it."""
        drawn = [
            (mark.value, text_width(mark.text, style.VALUE_SIZE) + 6)
            for mark in self.marks.values()
            if mark.value is not None
        ]
        return [*drawn, *((value, 0.0) for value in self.reference.values())]

    @property
    def looks(self) -> list[Look]:
        """The ways of filling a bar that occur."""
        drawn = {mark.look for mark in self.marks.values() if mark.value is not None}
        return [look for look in Look if look in drawn]

    @property
    def has_legend(self) -> bool:
        """Where every bar is solid and there is nothing to compare with, it would say nothing."""
        return bool(self.reference) or any(look is not Look.SOLID for look in self.looks)


@dataclass(frozen=True)
class Page:
    """The page's sizes in inches, from its content; y counts from the bottom."""

    name_width: float
    plot_width: float
    columns: int
    group_rows: float
    rows_high: float
    subtitle: tuple[str, ...]
    notes: tuple[str, ...]
    has_legend: bool

    @classmethod
    def of(cls, content: Content) -> Page:
        """The page that the content needs."""
        labels = [system_label(system) for system in content.systems]
        columns = len(content.models)
        name_width = text_width(max(labels, key=len), style.NAME_SIZE) + 8
        plot_width = style.PLOT_WIDTHS.get(columns, style.PLOT_WIDTH_OF_MANY)
        group_rows = len(content.systems) + style.HEADING_ROWS
        page = cls(
            name_width=name_width / POINTS,
            plot_width=plot_width,
            columns=columns,
            group_rows=group_rows,
            rows_high=len(content.shapes) * group_rows,
            subtitle=(),
            notes=(),
            has_legend=content.has_legend,
        )
        line_width = (page.width - 2 * style.MARGIN) * POINTS
        return replace(
            page,
            subtitle=_wrapped((content.subtitle,), line_width, style.SUBTITLE_SIZE),
            notes=_wrapped(content.notes, line_width, style.NOTE_SIZE),
        )

    @property
    def width(self) -> float:
        """Of the whole page."""
        panels = self.columns * (self.name_width + self.plot_width)
        return panels + (self.columns - 1) * style.GAP + 2 * style.MARGIN

    @property
    def foot(self) -> float:
        """Height below the panels: axis, legend, notes."""
        return 0.52 + 0.26 * self.has_legend + 0.16 * len(self.notes) + 0.2

    @property
    def head(self) -> float:
        """Height above the panels: title, subtitle, the panels' names."""
        return 0.62 + 0.18 * len(self.subtitle) + 0.35

    @property
    def height(self) -> float:
        """Of the whole page."""
        return self.head + self.rows_high * style.ROW + self.foot

    def panel(self, column: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel's axes, as fractions of the page."""
        step = self.name_width + self.plot_width + style.GAP
        left = style.MARGIN + self.name_width + column * step
        return (
            left / self.width,
            self.foot / self.height,
            self.plot_width / self.width,
            self.rows_high * style.ROW / self.height,
        )

    def heading(self, group: int) -> float:
        """Where a shape's heading stands, in rows from the panel's top."""
        return group * self.group_rows + style.HEADING_ROWS / 2

    def row(self, group: int, place: int) -> float:
        """Where a system's bar stands, in rows from the panel's top."""
        return group * self.group_rows + style.HEADING_ROWS + place + 0.35


def text_width(text: str, size: float) -> float:
    """Points that a short text takes; never too few."""
    em = style.TEXT_EM if any(map(str.isalpha, text)) else style.DIGIT_EM
    return len(text) * em * size


def _wrapped(texts: tuple[str, ...], width: float, size: float) -> tuple[str, ...]:
    letters = int(width / (size * style.PROSE_EM))
    return tuple(line for text in texts for line in textwrap.wrap(text, letters))
