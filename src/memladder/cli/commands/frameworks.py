"""`memladder frameworks`: what can run here."""

from __future__ import annotations

from rich import box
from rich.table import Table

from memladder import frameworks
from memladder.cli.console import plain_console
from memladder.cli.options import Device
from memladder.meter import environment
from memladder.paper import rows
from memladder.reports import printing
from memladder.sweeps import cases as sweep_cases


def list_frameworks(device: Device = "auto") -> None:
    """What can run here, and what the rest is missing."""
    resolved = environment.resolve_device(device)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, is_firm in (
        ("key", True),
        ("system", False),
        (f"on {resolved}", True),
        ("version", True),
        ("why not", False),
        ("to get it", False),
    ):
        table.add_column(column, overflow="fold", no_wrap=is_firm)
    for name in sweep_cases.parse_frameworks("all", first=rows.SYSTEMS):
        found = sweep_cases.availability(name, resolved)
        table.add_row(
            name,
            frameworks.get(name).title,
            "planned" if found.plans else "yes" if found.available else "no",
            found.version or "",
            found.reason or "",
            found.install or "",
        )
    printing.print_table(plain_console(), table)
