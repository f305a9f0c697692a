"""What a person sees while a sweep works: a live table with a progress bar, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.record import Record, Status
from memladder.core.text import shown
from memladder.core.units import mib
from memladder.meter.outside.runner import Event

_STYLES = {
    Status.MEASURED: "bold",
    Status.OOM: "yellow",
    Status.BUSY: "yellow",
    Status.FAILED: "red",
    Status.TIMEOUT: "red",
}


def cell_text(record: Record) -> str:
    """What a table's cell says of a record: MiB where measured or planned, else the status."""
    if record.plan is not None:
        return f"{mib(record.plan.nbytes):,.0f} {record.status}"
    if record.steady_bytes is None:
        return str(record.status)
    return f"{mib(record.steady_bytes):,.0f}"


def prior_seconds(case: Case, repeats: int) -> float:
    """A first guess of a case's duration, only for the ETA: start-up and compiling, then a pass.

    Two FLOP a parameter and token, at a rate that a small CPU or a GPU reaches on such layers.
    """
    parameters = 2.5e9 if case.model == "bloom" else 0.9e9
    start_s, rate = (25.0, 1e14) if case.device.startswith("cuda") else (30.0, 2e11)
    return repeats * (start_s + 2 * parameters * case.shape.tokens / rate)


class Clock:
    """Remaining time, from the priors of what is left, scaled by what the done ones took."""

    def __init__(self, cases: Sequence[Case], repeats: int) -> None:
        self._priors = {case.id: prior_seconds(case, repeats) for case in cases}
        self._left = sum(self._priors.values())
        self._done = self._took = 0.0
        self._current: tuple[str, float] | None = None

    def start(self, case: Case) -> None:
        """A case begins now."""
        self._current = (case.id, time.monotonic())

    def finish(self, case: Case, seconds: float, resumed: bool) -> None:
        """A case has ended; resumed ones say nothing about speed."""
        self._left -= self._priors[case.id]
        if not resumed:
            self._done += self._priors[case.id]
            self._took += seconds
        self._current = None

    def eta_s(self) -> float:
        """Seconds until all cases are done, as far as can be told."""
        scale = self._took / self._done if self._done else 1.0
        eta = self._left * scale
        if self._current is not None:
            case_id, since = self._current
            eta -= min(time.monotonic() - since, self._priors[case_id] * scale)
        return max(eta, 0.0)


def duration(seconds: float) -> str:
    """Minutes and seconds.

    >>> duration(75.4)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class SweepView:
    """The view of a sweep on a console; use it as a context manager around the sweep."""

    def __init__(self, cases: Sequence[Case], repeats: int, console: Console) -> None:
        self._cases = cases
        self._console = console
        self._clock = Clock(cases, repeats)
        self._cells: dict[Case, Text] = {}
        self._finished = 0
        self._began = time.monotonic()
        self._current: Case | None = None
        self._doing = ""
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> SweepView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def started(self, case: Case) -> None:
        self._clock.start(case)
        self._current, self._doing = case, "starting"

    def verifying(self, framework: str) -> None:
        name = frameworks.get(framework).title
        self._current, self._doing = None, f"checking {name} against the fp32 reference"
        if not self._console.is_terminal:
            self._console.print(self._doing, highlight=False)

    def event(self, event: Event) -> None:
        self._doing = str(event)
        if self._current is not None:
            self._cells[self._current] = Text("…", style="cyan")

    def finished(self, record: Record, seconds: float, resumed: bool) -> None:
        self._clock.finish(record.case, seconds, resumed)
        self._finished += 1
        self._current, self._doing = None, ""
        style = "dim" if resumed else _STYLES.get(record.status, "dim")
        self._cells[record.case] = Text(cell_text(record), style=style)
        if not self._console.is_terminal:
            unit = " MiB" if record.steady_bytes is not None else ""
            how = "already measured" if resumed else f"{seconds:.0f} s"
            self._console.print(
                f"[{self._finished}/{len(self._cases)}] {record.case.id}: "
                f"{cell_text(record)}{unit} ({how}; ETA {duration(self._clock.eta_s())})",
                highlight=False,
                markup=False,
            )
        if record.reason and not resumed:
            self.warning(f"{record.case.id}: {record.status}: {record.reason}")

    def warning(self, text: str) -> None:
        self._console.print(Text(shown(text), style="yellow"))

    def _render(self) -> Group:
        return Group(self._table(), self._bar())

    def _table(self) -> Table:
        shapes = list(dict.fromkeys(case.shape for case in self._cases))
        table = Table(title="Steady memory of one layer, MiB", title_justify="left")
        table.add_column("model")
        table.add_column("framework")
        for shape in shapes:
            table.add_column(str(shape), justify="right", min_width=8, no_wrap=True)
        rows = dict.fromkeys((case.model, case.framework) for case in self._cases)
        for model, framework in rows:
            cells = [self._cell(model, framework, shape) for shape in shapes]
            table.add_row(models.title(model), frameworks.get(framework).title, *cells)
        return table

    def _cell(self, model: str, framework: str, shape: Workload) -> Text:
        for case, text in self._cells.items():
            if (case.model, case.framework, case.shape) == (model, framework, shape):
                return text
        return Text("·", style="dim")

    def _bar(self) -> Table:
        now = shown(f"{self._current.id}: {self._doing}" if self._current else self._doing)
        line = Text.assemble(
            (f"{self._finished}/{len(self._cases)} cells", "bold"),
            f"  elapsed {duration(time.monotonic() - self._began)}",
            f"  ETA {duration(self._clock.eta_s())}  ",
            (now, "cyan"),
            overflow="ellipsis",
            no_wrap=True,
        )
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=len(self._cases), completed=self._finished, width=40)
        grid.add_row(bar, line)
        return grid
