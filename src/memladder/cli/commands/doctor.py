"""`memladder doctor`: what this machine has, and what to fix."""

from __future__ import annotations

import typer
from rich.table import Table

from memladder.cli.console import plain_console
from memladder.reports import printing


def doctor() -> None:
    """What this machine has, who uses its GPUs, what to fix."""
    from memladder.checks.doctor import findings

    table = Table("what", "found", "to fix it")
    found = findings()
    for finding in found:
        style = None if finding.good else "yellow"
        table.add_row(finding.subject, finding.text, finding.fix or "", style=style)
    printing.print_table(plain_console(), table)
    raise typer.Exit(0 if all(finding.good for finding in found) else 1)
