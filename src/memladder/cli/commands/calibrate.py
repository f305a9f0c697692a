"""`memladder calibrate`: the meter against known sizes."""

from __future__ import annotations

import typer
from rich.table import Table

from memladder.cli.console import plain_console
from memladder.cli.options import HERE, Device, OutputDir
from memladder.core.units import format_bytes, mib
from memladder.meter import environment
from memladder.reports import printing
from memladder.sweeps import store


def calibrate(device: Device = "auto", output_dir: OutputDir = HERE) -> None:
    """Check the meter against a worker that takes known sizes."""
    from memladder.checks import calibration

    resolved = environment.resolve_device(device)
    kept = store.Store(output_dir / "log")
    table = Table("device")
    printing.add_numbers(table, "allocated", "read", "difference", "bound", "holds")
    holds = True
    with kept.locked():
        for reading in calibration.calibrate(resolved, kept.log_path("calibration")):
            holds = holds and reading.holds
            table.add_row(
                reading.device,
                format_bytes(reading.asked_bytes),
                format_bytes(reading.read_bytes),
                f"{mib(reading.read_bytes - reading.asked_bytes):+.2f} MiB",
                format_bytes(reading.bound_bytes),
                "yes" if reading.holds else "NO",
            )
    printing.print_table(plain_console(), table)
    raise typer.Exit(0 if holds else 1)
