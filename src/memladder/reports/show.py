"""One record for a person: how it ended, bytes by phase, settings, environment, quality."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from memladder.core.record import Record, Run
from memladder.core.text import shown
from memladder.core.units import format_bytes, mib
from memladder.reports.cells import plain_name
from memladder.reports.printing import add_numbers, print_table


def print_record(record: Record, console: Console) -> None:
    """Print everything that explains the record's number; the raw trace stays in the file."""
    print_table(console, _facts(record))
    for number, run in enumerate(record.runs, 1):
        print_table(
            console, _phases(run, f"Run {number} of {len(record.runs)}, {run.started}, MiB")
        )
        print_table(console, _quality(run))
    for title, pairs in (
        ("Settings", record.settings),
        ("Packages", record.environment.packages),
        ("Variables", record.environment.variables),
    ):
        if pairs:
            print_table(console, _pairs(title, pairs))


def _facts(record: Record) -> Table:
    machine = record.environment.machine
    facts: dict[str, object] = {"status": str(record.status), "reason": record.reason or ""}
    if record.steady_bytes is not None and record.peak_bytes is not None:
        facts["steady"] = format_bytes(record.steady_bytes)
        facts["peak"] = format_bytes(record.peak_bytes)
    if (base := record.import_bytes) is not None:
        torch = record.environment.packages.get("torch")
        facts["libraries, on import"] = format_bytes(base) + (f", torch {torch}" if torch else "")
        facts["steady over import"] = format_bytes(record.over_import_bytes)
    if record.spread is not None:
        facts["spread over runs"] = f"{record.spread:.2%}"
    if record.asked_bytes is not None:
        facts["asked for"] = format_bytes(record.asked_bytes)
    if record.layer is not None:
        facts["parameters"] = f"{record.layer.parameters:,}"
        facts["weights at fp16"] = format_bytes(record.layer.weight_bytes)
        facts["layer"] = " ".join(f"{key}={value}" for key, value in record.layer.config.items())
    if (plan := record.plan) is not None:
        facts["planned for"] = f"{plan.target}, by {plan.compiler}"
        facts |= {plain_name(name): format_bytes(size) for name, size in plan.parts.items()}
        facts |= {
            f"{plain_name(name)}, assumed": format_bytes(size)
            for name, size in plan.assumed.items()
        }
    driver = f", driver {machine.driver}, CUDA {machine.cuda}" if machine.driver else ""
    facts["device"] = f"{machine.device}, {format_bytes(machine.device_memory_bytes)}{driver}"
    facts["host"] = (
        f"{machine.cpu}, {machine.cores} cores, {format_bytes(machine.memory_bytes)}; "
        f"{machine.os}, Linux {machine.kernel}; Python {record.environment.python_label}"
    )
    facts["memladder"] = f"{record.environment.memladder}, commit {record.environment.commit}"
    return _pairs(record.case.id, facts)


def _phases(run: Run, title: str) -> Table:
    """On CUDA `peak` is the device's."""
    table = Table(
        title=shown(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("phase", no_wrap=True)
    add_numbers(table, *("seconds", "polls", "peak", "end", "PSS\npeak", "USS\npeak", "RSS\npeak"))
    for phase in run.phases:
        sizes = (
            phase.peak_bytes,
            phase.end_bytes,
            phase.pss_peak_bytes,
            phase.uss_peak_bytes,
            phase.rss_peak_bytes,
        )
        table.add_row(
            phase.name,
            f"{phase.end_s - phase.start_s:.2f}",
            str(phase.polls),
            *(f"{mib(size):,.1f}" for size in sizes),
        )
    return table


def _quality(run: Run) -> Table:
    quality: dict[str, object] = {
        "source": str(run.source),
        "passes in steady": run.passes,
        "polls a second": f"{run.polls_per_s:.0f}",
        "longest gap": f"{1000 * run.longest_gap_s:.1f} ms",
    }
    if run.idle_device_bytes is not None:
        quality["device before"] = format_bytes(run.idle_device_bytes)
    for process in run.foreign:
        quality[f"foreign process {process.pid}"] = (
            process.name
            if process.peak_bytes is None
            else f"{process.name}, {format_bytes(process.peak_bytes)}"
        )
    for name, size in run.categories.items():
        quality[name] = format_bytes(size)
    return _pairs("Quality and what the framework says", quality)


def _pairs(title: str, pairs: Mapping[str, object]) -> Table:
    table = Table(title=shown(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in pairs.items():
        if value != "":
            table.add_row(shown(key), shown(value))
    return table
