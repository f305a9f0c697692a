"""What the user asked to be measured, and what of it can't be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from memladder.cli.ending import say
from memladder.core.case import Workload
from memladder.meter.outside import runner
from memladder.models import Subject
from memladder.models.cache import default_dir
from memladder.paper import rows
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps import subjects
from memladder.sweeps.executors import serial


@dataclass(frozen=True)
class Request:
    """What the user asked for, as typed; None where nothing was."""

    models: str | None = None
    frameworks: str | None = None
    shapes: str | None = None
    device: str = "auto"
    config: Path | None = None
    layer: int | None = None
    layers: int | str = 1
    repeats: int = 1
    timeout_s: float = 1800.0
    output_dir: Path = Path()
    cache_dir: Path | None = None
    fresh: bool = False
    retry: str | None = None
    results: Path | None = None

    @property
    def log(self) -> Path:
        """The folder of the records."""
        return self.output_dir / "log"

    @property
    def wanted(self) -> tuple[str, ...]:
        """Which models, by name or path; the figure's by default."""
        return tuple(rows.MODELS) if self.models is None else sweep_cases.parse_models(self.models)

    @property
    def framework_names(self) -> tuple[str, ...]:
        """Which frameworks; the figure's by default."""
        if self.frameworks is None:
            return tuple(rows.SYSTEMS)
        return sweep_cases.parse_frameworks(self.frameworks, first=rows.SYSTEMS)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """At which shapes; the figure's by default."""
        return rows.SHAPES if self.shapes is None else sweep_cases.parse_shapes(self.shapes)

    def subjects(self) -> dict[str, Subject]:
        """What is measured of each model, with a note on stderr where that is not all that was
        asked for."""
        found = subjects.subjects(
            self.wanted,
            self.options().cache_dir,
            config=self.config,
            layer=self.layer,
            layers=self.layers,
        )
        for name, subject in found.items():
            for note in (subject.note, subjects.too_long(subject, self.workloads)):
                if note:
                    say(f"note: {name}: {note}")
        return found

    def options(self) -> serial.SweepOptions:
        """How to measure."""
        return serial.SweepOptions(
            cache_dir=(self.cache_dir or default_dir()).absolute(),
            repeats=self.repeats,
            limits=runner.Limits(timeout_s=self.timeout_s),
            fresh=self.fresh,
            retry=sweep_cases.parse_statuses(self.retry),
        )


def tell_missing(names: Sequence[str], device: str, console: Console) -> None:
    """Say which frameworks are left out, and how to get them."""
    for name in names:
        found = sweep_cases.availability(name, device)
        hint = f"; to get it: {found.install}" if found.install else ""
        console.print(
            f"{name} can't run on {device} here: {found.reason}{hint}",
            style="dim",
        )
