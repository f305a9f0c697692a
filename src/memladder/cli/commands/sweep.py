"""`memladder sweep`: the figure's cases, measured and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from memladder import api
from memladder.cli.console import plain_console
from memladder.cli.drawing import draw
from memladder.cli.ending import say
from memladder.cli.options import (
    DEFAULT_TIMEOUT,
    HERE,
    MAX_REPEATS,
    CacheDir,
    Config,
    Device,
    Frameworks,
    Fresh,
    Layers,
    Models,
    OutputDir,
    Repeats,
    Results,
    Retry,
    Shapes,
    Timeout,
    count,
    seconds,
)
from memladder.cli.requests import Request, tell_missing
from memladder.core.errors import UsageError
from memladder.core.files import writable_folder
from memladder.core.record import Record
from memladder.core.verification import Verification
from memladder.meter import environment
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps import store, subjects
from memladder.sweeps.executors import serial


def sweep(
    models: Models = None,
    frameworks: Frameworks = None,
    shapes: Shapes = None,
    device: Device = "auto",
    fresh: Fresh = False,
    retry: Retry = None,
    config: Config = None,
    repeats: Repeats = "1",
    timeout: Timeout = DEFAULT_TIMEOUT,
    output_dir: OutputDir = HERE,
    cache_dir: CacheDir = None,
    results: Results = None,
    layers: Layers = "1",
) -> None:
    """Measure the figure's cases here and draw them; resumes."""
    request = Request(
        models=models,
        frameworks=frameworks,
        shapes=shapes,
        device=device,
        config=config,
        repeats=count("repeats", repeats, MAX_REPEATS),
        timeout_s=seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
        fresh=fresh,
        retry=retry,
        results=results,
        layers=subjects.parse_scope(layers),
    )
    raise typer.Exit(_sweep(request))


def _sweep(request: Request) -> int:
    """Measure the figure's cases here, draw them. 0 when all that could run was measured."""
    from memladder.sweeps.live import SweepView

    if request.results is not None:
        store.require_results(request.results)
    device = environment.resolve_device(request.device)
    names = request.framework_names
    shapes = request.workloads
    chosen = request.subjects()
    runnable, missing = api.available(names, device)
    cases = sweep_cases.select(chosen, runnable, shapes, device, request.layers)
    kept = store.Store(request.log)
    console = plain_console(stderr=True)
    with kept.locked():
        for folder in ("png", "pdf"):
            writable_folder(request.output_dir / folder)
        tell_missing(missing, device, console)
        if not cases:
            raise UsageError(f"none of the frameworks {', '.join(names)} can run on {device} here")
        with SweepView(cases, request.repeats, console) as view:
            outcome = serial.sweep(cases, chosen, kept, request.options(), view)
    absent = sweep_cases.select(chosen, missing, shapes, device, request.layers)
    records = [*outcome.records, *api.unavailable(absent)]
    if request.results is not None:
        told = store.merge_results(
            request.results, list(outcome.records), list(outcome.verifications)
        )
        for line in told:
            say(f"warning: {line}")
    draw(records, outcome.verifications, request.output_dir)
    _report(records, outcome.verifications, request.output_dir)
    return 0 if outcome.succeeded else 1


def _report(
    records: Sequence[Record], verifications: Sequence[Verification], output_dir: Path
) -> None:
    from memladder.paper import page
    from memladder.reports.html.rows import Shown

    out = output_dir / "report.html"
    page.write([Shown("this sweep", tuple(records), tuple(verifications))], out)
    print(out)
