"""`run_all.py`: the artifact's figure, as published or measured here."""

from __future__ import annotations

from typing import Annotated

import typer

from memladder.cli.commands.figure import figure
from memladder.cli.commands.sweep import sweep
from memladder.cli.options import (
    DEFAULT_TIMEOUT,
    HERE,
    CacheDir,
    Config,
    Device,
    Frameworks,
    Fresh,
    Models,
    OutputDir,
    Repeats,
    Results,
    Retry,
    Shapes,
    Timeout,
)
from memladder.core.errors import UsageError


def run_all(
    context: typer.Context,
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="Measure on this machine, then draw.")
    ] = False,
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
) -> None:
    """Draw Figure 11 from the published data; with --reproduce, measure it here and draw that."""
    if reproduce:
        sweep(
            models, frameworks, shapes, device, fresh, retry, config,
            repeats, timeout, output_dir, cache_dir, results,
        )  # fmt: skip
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ("reproduce", "output_dir")
        and str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"{', '.join(given)} measures, so it needs --reproduce")
    figure(None, output_dir)
