"""`memladder verify`: frameworks against a reference."""

from __future__ import annotations

import math

import typer
from rich.console import Console
from rich.table import Table

from memladder import api, frameworks
from memladder.cli.console import plain_console
from memladder.cli.options import (
    DEFAULT_TIMEOUT,
    HERE,
    CacheDir,
    Device,
    Frameworks,
    OutputDir,
    Timeout,
    seconds,
)
from memladder.cli.requests import Request, tell_missing
from memladder.cli.terminal import telling
from memladder.core.errors import UsageError
from memladder.core.verification import Check
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.reports import printing
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps import store


def verify(
    frameworks: Frameworks = None,
    device: Device = "auto",
    timeout: Timeout = DEFAULT_TIMEOUT,
    output_dir: OutputDir = HERE,
    cache_dir: CacheDir = None,
) -> None:
    """Compare frameworks with an fp32 reference."""
    request = Request(
        frameworks=frameworks,
        device=device,
        timeout_s=seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
    )
    raise typer.Exit(_verify(request))


def _verify(request: Request) -> int:
    """Compare frameworks with the reference; 0 when all agree."""
    device = environment.resolve_device(request.device)
    names = request.framework_names
    runnable, missing = api.available(names, device)
    planned = [name for name in runnable if sweep_cases.availability(name, device).plans]
    runnable = [name for name in runnable if name not in planned]
    console = plain_console(stderr=True)
    tell_missing([*missing, *planned], device, console)
    if not runnable:
        raise UsageError(f"none of the frameworks {', '.join(names)} can run on {device} here")
    options = request.options()
    kept = store.Store(request.log)
    table = Table("framework", "model")
    printing.add_numbers(table, "shape", "tokens", "error", "tolerance", "agrees", "SQNR, dB")
    structure = Table("framework", "model", "shape", "agrees", "held, as the output can't be read")
    agree = True
    with kept.locked():
        for name in runnable:
            with telling(name, console) as tell:
                verification = runner.verify(
                    name,
                    frameworks.get(name),
                    device,
                    cache_dir=options.cache_dir,
                    limits=options.limits,
                    log_path=kept.log_path(f"verification_{name}"),
                    on_event=tell,
                )
            kept.save(verification)
            agree = agree and verification.agrees
            for check in verification.checks:
                _tell_reason(name, check, console)
                table.add_row(
                    name,
                    check.model,
                    str(check.shape),
                    str(check.tokens),
                    f"{check.error:.2e}",
                    f"{check.tolerance:.1e}",
                    "yes" if check.agrees else "NO",
                    "" if check.sqnr_db is None else f"{check.sqnr_db:.1f}",
                )
            for held in verification.structure or ():
                agrees = "yes" if held.agrees else "NO"
                structure.add_row(name, held.model, str(held.shape), agrees, held.explain())
    for one in (table, structure):
        one.columns[0].no_wrap = True
        if one.row_count:
            printing.print_table(plain_console(), one)
    return 0 if agree else 1


def _tell_reason(name: str, check: Check, console: Console) -> None:
    """What the table can't say of a check that does not agree."""
    where = f"{name}, {check.model} {check.shape}"
    if math.isnan(check.error):
        console.print(f"{where}: the output holds NaN or infinity: values beyond its dtype")
    elif not check.keeps_the_layer:
        console.print(
            f"{where}: {check.quantisation_error:.2e} is lost of the true layer, where its number "
            f"format explains {check.quantisation_tolerance:.1e}: its weights are others"
        )
