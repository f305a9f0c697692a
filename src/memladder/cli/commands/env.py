"""`memladder env …`: environments of frameworks' own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from memladder import frameworks
from memladder.cli.console import plain_console
from memladder.cli.options import Device
from memladder.core.errors import UsageError
from memladder.environments import ask, install, interpreter
from memladder.meter import environment
from memladder.reports.printing import print_table

# How many packages a requirements file brings with it, as its comment says.
_PACKAGES = re.compile(r"^# packages: (\d+)", re.MULTILINE)
_FOUND = re.compile(r"Collecting (\S+)")
_WIDTH = 60

EnvironmentOf = Annotated[
    str, typer.Argument(metavar="FRAMEWORK", help="A framework's key; its variants share one.")
]


def create(
    framework: EnvironmentOf,
    device: Device = "auto",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The Python to make it of; default: ours.")
    ] = None,
) -> None:
    """Make an environment from a framework's pinned requirements, under the cache folder."""
    name = _name(framework)
    resolved = environment.resolve_device(device)
    wanted = install.requirements(name, resolved)
    base = None if python is None else interpreter.located(python)
    with _progress(name, wanted) as on_line:
        path = install.create(name, resolved, base, on_line)
    print(path)
    _tell(name, resolved)


def use(
    framework: EnvironmentOf,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="An interpreter that has the framework.")
    ],
) -> None:
    """Let a framework's workers start with an interpreter that is there already."""
    name = _name(framework)
    print(install.use(name, python).python)
    told = interpreter.variable(name)
    _say(f"the variable {told}, where it is set, comes first")
    _tell(name, environment.resolve_device("auto"))


def list_environments() -> None:
    """Whose Python each framework runs in."""
    table = Table()
    table.add_column("environment", no_wrap=True)
    for column in ("whose", "interpreter", "to change it"):
        table.add_column(column, overflow="fold")
    for item in install.listed():
        table.add_row(
            item.name,
            item.interpreter.label or "memladder's own",
            str(item.interpreter.python),
            _advice(item),
        )
    print_table(plain_console(), table)


def remove(framework: EnvironmentOf) -> None:
    """Delete a made environment; only forget one that was pointed to."""
    for line in install.remove(_name(framework)):
        print(line)


def _advice(item: install.Listed) -> str:
    if not item.is_current:
        return f"made for another version: memladder env remove {item.name}, then create"
    if item.interpreter.label is not None:
        return f"memladder env remove {item.name}"
    verb = "create" if item.can_be_made else "use"
    rest = "" if item.can_be_made else " --python PATH"
    return f"memladder env {verb} {item.name}{rest}"


def _name(framework: str) -> str:
    """The environment of a framework's key, or an environment's own name. Raises UsageError."""
    known = {interpreter.family(key) for key in frameworks.names()} | set(install.names())
    if framework not in frameworks.names() and framework not in known:
        every = ", ".join(sorted(known | set(frameworks.names())))
        raise UsageError(f"unknown framework {framework!r}; known: {every}")
    return interpreter.family(framework)


def _tell(name: str, device: str) -> None:
    for key in frameworks.names():
        if interpreter.family(key) == name:
            found = ask.availability(key, frameworks.get(key), device)
            can = f"can run on {device}" if found.available else f"can't run on {device} here"
            _say(f"{key} {can}{f': {found.reason}' if found.reason else ''}")


def _say(text: str) -> None:
    plain_console(stderr=True).print(text)


@contextmanager
def _progress(name: str, wanted: Path) -> Iterator[Callable[[str], None]]:
    """A bar that counts packages found, with what the installer says beside it; it goes away."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    found = _PACKAGES.search(wanted.read_text(encoding="utf-8"))
    console = plain_console(stderr=True)
    columns = (
        TextColumn(f"environment {name}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("an empty environment", total=int(found[1]) if found else None)

        def on_line(line: str) -> None:
            if not line.startswith("WARNING"):
                bar.update(task, description=line[:_WIDTH], advance=bool(_FOUND.match(line)))

        yield on_line
