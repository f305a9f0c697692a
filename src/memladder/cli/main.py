"""The command line: `memladder …`, and the two scripts of the paper's artifact.

A command has its file in `commands`; here they are registered. An error is one line on stderr and
exit status 2.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from memladder import __version__
from memladder.cli import ending
from memladder.cli.commands import env
from memladder.cli.commands.cache import show_cache
from memladder.cli.commands.calibrate import calibrate
from memladder.cli.commands.check_predictions import check_predictions
from memladder.cli.commands.compile import compile_layer
from memladder.cli.commands.dequantize import dequantize
from memladder.cli.commands.diff import diff
from memladder.cli.commands.doctor import doctor
from memladder.cli.commands.evaluate import evaluate
from memladder.cli.commands.explain import explain
from memladder.cli.commands.figure import figure
from memladder.cli.commands.fit import fit
from memladder.cli.commands.floor import floor
from memladder.cli.commands.frameworks import list_frameworks
from memladder.cli.commands.generate import generate
from memladder.cli.commands.measure import measure
from memladder.cli.commands.predict import predict
from memladder.cli.commands.quantize import quantize
from memladder.cli.commands.report import report
from memladder.cli.commands.run import run_layer
from memladder.cli.commands.run_all import run_all as reproduce
from memladder.cli.commands.seal import seal
from memladder.cli.commands.show import show
from memladder.cli.commands.sweep import sweep
from memladder.cli.commands.table import table
from memladder.cli.commands.tune import tune
from memladder.cli.commands.verify import verify


def _app(text: str, *, completion: bool = False) -> typer.Typer:
    """An application whose options and commands are typed with `-` or `_` alike."""
    return typer.Typer(
        help=text,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )


app = _app(
    "How much memory an LLM layer needs under an inference framework, measured.", completion=True
)
_run_all_app = _app("Draw Figure 11 from the published data, or measure it here and draw that.")
_measure_app = _app("Measure the memory of one decoder layer under one framework, at one shape.")
_env_app = _app("Environments of frameworks' own: made, pointed to, listed, removed.")
app.add_typer(_env_app, name="env")

app.command()(predict)
app.command()(fit)
app.command()(explain)
app.command()(diff)
app.command("check-predictions")(check_predictions)
app.command()(seal)
app.command()(report)
app.command()(figure)
app.command()(measure)
app.command()(sweep)
app.command()(verify)
app.command()(tune)
app.command("frameworks")(list_frameworks)
app.command()(show)
app.command()(table)
app.command()(floor)
app.command()(quantize)
app.command("compile")(compile_layer)
app.command("run")(run_layer)
app.command()(generate)
app.command()(evaluate)
app.command()(dequantize)
app.command("cache")(show_cache)
app.command()(doctor)
app.command()(calibrate)
_measure_app.command()(measure)
_run_all_app.command()(reproduce)
_env_app.command("create")(env.create)
_env_app.command("use")(env.use)
_env_app.command("list")(env.list_environments)
_env_app.command("remove")(env.remove)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memladder {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """How much memory an LLM layer needs under an inference framework, measured."""


def main() -> NoReturn:
    """Entry point `memladder`."""
    ending.run(app, sys.argv[1:] or ["--help"])


def run_all() -> NoReturn:
    """Entry point `run_all.py`."""
    ending.run(_run_all_app, sys.argv[1:])


def measure_memory() -> NoReturn:
    """Entry point `measure_memory.py`."""
    ending.run(_measure_app, sys.argv[1:])
