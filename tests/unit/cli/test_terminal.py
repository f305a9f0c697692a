"""Nothing that a record, a name or an error says is obeyed by the terminal that shows it."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from memladder.cli import ending, terminal
from memladder.cli.commands import table as command
from memladder.cli.console import plain_console
from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.meter.outside.runner import Event
from memladder.reports import show, table
from memladder.sweeps import store
from memladder.sweeps.live import SweepView
from tests.unit import examples
from tests.unit.command import Command

EVIL = "\x1b]0;pwned\x07\x1b[31mRED\x1b[2J\x9b31m\u202e|`x`\n## forged\r\t[red]x[/red]"


def harmless(text: str) -> None:
    """Is every line printable, and the text there?"""
    assert "\x1b]0;" not in text
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not any(line.startswith("## forged") for line in text.splitlines())
    assert "RED" in text


def record(**changes: object) -> object:
    environment = examples.elsewhere(EVIL)
    return examples.record(environment=environment, settings={EVIL: EVIL}, **changes)


def plain() -> tuple[terminal.PlainConsole, io.StringIO]:
    out = io.StringIO()
    return terminal.PlainConsole(file=out, markup=False, highlight=False, width=2000), out


def test_show_escapes_what_a_record_holds() -> None:
    made, out = plain()
    show.print_record(record(), made)  # type: ignore[arg-type]
    harmless(out.getvalue())
    assert "\\x1b[31mRED" in out.getvalue()


@pytest.mark.parametrize("form", [table.to_markdown, table.to_csv, table.to_json])
def test_tables_escape_it(form: object) -> None:
    failed = record(status=Status.FAILED, reason=EVIL)
    harmless(form(table.rows([failed], {})))  # type: ignore[operator]


@pytest.mark.parametrize("force", [True, False])
def test_the_live_view_escapes_it(force: bool) -> None:
    out = io.StringIO()
    made = terminal.PlainConsole(
        file=out, force_terminal=force, markup=False, highlight=False, width=400, no_color=True
    )
    case = Case("llama", "pytorch", Workload(1, 1), "cpu")
    with SweepView([case], 1, made) as view:
        view.started(case)
        view.event(Event(EVIL, 1, 1, 5))
        view.finished(record(status=Status.FAILED, reason=EVIL), 1.0, resumed=False)  # type: ignore[arg-type]
    assert "\x1b]0;" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\x9b" not in out.getvalue()
    assert "\u202e" not in out.getvalue()


def test_cells_and_lines_of_a_console_are_escaped() -> None:
    made, out = plain()
    cells = Table("what", title=EVIL)
    cells.add_row(EVIL)
    made.print(cells)
    made.print(EVIL)
    made.print(Text("own", style="bold"))
    text = out.getvalue()
    assert "\\x1b[2J" in text
    assert "[red]x[/red]" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ending.fail(EVIL)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    harmless(said)


def test_names_of_files_are_escaped(memladder: Command, tmp_path: Path) -> None:
    done = memladder("table", tmp_path / "a\x1b[2Jb\nc")
    assert done.code == 2
    assert "a\\x1b[2Jb\\nc" in done.err
    assert done.err.count("\n") == 1


def test_warnings_about_a_store_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = store.Contents([record()], [], {tmp_path / "x\x1b[1m.json": EVIL})  # type: ignore[list-item]
    monkeypatch.setattr(store, "read", lambda _: found)
    command.table(tmp_path, "md")
    said = capsys.readouterr()
    harmless(said.err)
    assert said.err.count("\n") == 1


def test_measuring_tells_each_phase_once_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal.telling("llama_pytorch_1_1", plain_console(stderr=True)) as tell:
        for size in (1, 2, 3):
            tell(Event("weights", 1, 1, size << 20))
        tell(Event("compile", 1, 1, 5 << 20))
        later = time.monotonic() + 31
        monkeypatch.setattr(terminal.time, "monotonic", lambda: later)
        tell(Event("compile", 1, 1, 6 << 20))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        "llama_pytorch_1_1: weights, 1.0 MiB",
        "llama_pytorch_1_1: compile, 5.0 MiB",
        "llama_pytorch_1_1: compile, 6.0 MiB",
    ]
    assert [line.rpartition(", ")[2] for line in lines] == ["0 s", "0 s", "31 s"]


def test_the_figure_has_a_glyph_for_whatever_a_record_says(
    memladder: Command, tmp_path: Path
) -> None:
    """matplotlib warns of every character that its font lacks; warnings are errors here."""
    kept = store.Store(tmp_path / "log")
    kept.save(record())  # type: ignore[arg-type]
    done = memladder("figure", tmp_path / "log")
    assert (done.code, done.err) == (0, "")
    harmless((tmp_path / "png/memory_usage_cpu.md").read_text())
