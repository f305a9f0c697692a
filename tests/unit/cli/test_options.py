"""Every option of every command is typed with `-` or `_` alike; shells complete them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from memladder.cli import main as cli

APPLICATIONS = {
    "memladder": cli.app,
    "memladder-run-all": cli._run_all_app,
    "memladder-measure-memory": cli._measure_app,
}


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and all below it, by how they are typed."""
    children = getattr(command, "commands", {})
    for child, below in children.items():
        yield from commands(f"{name} {child}", below)
    if not children:
        yield name, command


COMMANDS = dict(
    found
    for name, application in APPLICATIONS.items()
    for found in commands(name, typer.main.get_command(application))
)


def test_there_are_as_many_commands_as_help_tells() -> None:
    assert {"memladder fit", "memladder env create", "memladder-run-all"} <= set(COMMANDS)
    assert len(COMMANDS) >= 28


@pytest.mark.parametrize("name", COMMANDS)
def test_options_take_hyphens_and_underscores(name: str) -> None:
    command = COMMANDS[name]
    parent = typer.main.get_command(APPLICATIONS[name.split()[0]]).make_context(
        name, [], resilient_parsing=True
    )
    context = type(parent)(command, parent=parent, info_name=name, resilient_parsing=True)
    for option in command.params:
        if option.param_type_name != "option" or option.is_eager:
            continue
        for text in (opt[2:] for opt in option.opts if opt.startswith("--")):
            for typed in {f"--{text.replace('-', '_')}", f"--{text.replace('_', '-')}"}:
                given = [typed] if option.is_flag else [typed, "1"]
                found, rest, _ = command.make_parser(context).parse_args(given)
                assert option.name in found, typed
                assert rest == []


def test_a_command_s_name_too(tmp_path: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memladder", "check_predictions", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "check-predictions [OPTIONS]" in done.stdout


def test_a_shell_completes_commands_and_options() -> None:
    code = "import sys; sys.argv[0] = 'memladder'\nfrom memladder.cli.entry import main\nmain()"

    def completed(words: str, at: int) -> list[str]:
        asked = {
            "_MEMLADDER_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(at),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.split()

    assert completed("memladder qua", 1) == ["quantize"]
    assert completed("memladder fit --con", 2) == ["--context"]
