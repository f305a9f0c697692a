"""Print docs/reference/commands.md: every command, its arguments and options, as they are declared.

python docs/commands.py > docs/reference/commands.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from memladder.cli import main

STARTS = (
    ("memladder", main.app),
    ("memladder-run-all", main._run_all_app),
    ("memladder-measure-memory", main._measure_app),
)
HEAD = """# Commands

`docs/commands.py` writes this page from the commands themselves. Every option is typed with `-` or
`_` alike. Bad input gets one line and exit status 2; an interrupt ends with 130.
`memladder --install-completion` lets the shell (bash, zsh, fish, PowerShell) complete commands and
options; `--show-completion` prints the script. `python3 run_all.py` and `python3 measure_memory.py`
in a clone are `memladder-run-all` and `memladder-measure-memory`.
"""


def page() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for name, application in STARTS:
        for typed, command in sorted(_commands(name, typer.main.get_command(application))):
            parts.append(_section(typed, command))
    return "\n".join(parts)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", {})
    for child, inner in below.items():
        yield from _commands(f"{name} {child}", inner)
    if not below:
        yield name, command


def _section(name: str, command: Any) -> str:
    words = [one.metavar for one in command.params if one.param_type_name == "argument"]
    lines = [f"## {name}\n", f"`{' '.join((name, *words))}`\n", f"{command.help}\n"]
    rows = [_row(one) for one in command.params if not one.is_eager]
    if rows:
        lines += ["| argument or option | value | default | meaning |", "|---|---|---|---|", *rows]
        lines.append("")
    return "\n".join(lines)


def _row(one: Any) -> str:
    if one.param_type_name == "argument":
        name, value = f"`{one.metavar}`", ""
    else:
        name = ", ".join(f"`{text}`" for text in one.opts)
        value = "" if one.is_flag else f"`{one.metavar or 'VALUE'}`"
    default = "required" if one.required else _default(one.default)
    cells = (name, value, default, one.help or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    return "" if value is None or value is False or value == () else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
