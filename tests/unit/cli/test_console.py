"""What a terminal is sent: texts that its encoding takes, numbers that are whole however narrow."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from memladder.core.record import dumps
from memladder.core.units import GIB
from memladder.reports import show
from memladder.reports.printing import add_numbers, print_table
from memladder.sweeps.store import Store
from tests.unit import examples

ROOT = Path(__file__).parents[3]
ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    machine = replace(examples.MACHINE, device="Prozessor® × µ … 2²", cpu="naïve − → ⠋")
    environment = replace(examples.ENVIRONMENT, machine=machine, variables={"Ω": "‖x‖ ≤ 1"})
    kept = Store(tmp_path / "log")
    kept.save(examples.record(environment=environment))
    return tmp_path / "log"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "command",
    [
        ["table", "log", "--format", "md"],
        ["table", "log", "--format", "csv"],
        ["table", "log", "--format", "json"],
        ["show", "log/llama_pytorch_1_1.json"],
        ["show", "log/\udcff×.json"],
        ["sweep", "--help"],
        ["doctor"],
        ["frameworks", "--device", "cpu"],
    ],
    ids=" ".join,
)
def test_every_command_prints_in_every_encoding(
    log: Path, command: list[str], encoding: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memladder", *map(os.fsencode, command)],
        cwd=log.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **ENCODINGS[encoding]},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode("latin-1")
    bad = "\udcff" in command[-1]
    assert done.returncode == (2 if bad else done.returncode)
    assert done.returncode in ((0, 1) if command[0] == "doctor" else (2,) if bad else (0,))
    if encoding != "latin" and "--help" not in command:
        done.stdout.decode("ascii")
        done.stderr.decode("ascii")
    if command[0] == "table" and encoding != "latin" and command[-1] != "json":
        assert rb"Prozessor\xae x u ... 22" in done.stdout.replace(rb"\\", b"\\")


def test_numbers_are_whole_on_a_narrow_terminal() -> None:
    run = examples.run(1234 * GIB, 1)
    record = replace(examples.record(), runs=(run,))
    for width in (20, 40, 79, 80, 200):
        file = io.StringIO()
        console = Console(file=file, width=width, color_system=None)
        show.print_record(record, console)
        text = file.getvalue()
        assert "1,263,616.0" in text
        assert "…" not in text
        assert console.width == width


def test_a_case_of_ten_gib_fits_eighty_columns() -> None:
    record = replace(examples.record(), runs=(examples.run(11 * GIB, 11 * GIB),))
    file = io.StringIO()
    show.print_record(record, Console(file=file, width=80, color_system=None))
    (line,) = (line for line in file.getvalue().splitlines() if line.strip().startswith("steady "))
    assert re.fullmatch(r" *steady +1\.00 +100( +11,264\.0){5} *", line)
    assert len(line) <= 80


def test_texts_are_folded_and_numbers_are_not() -> None:
    table = Table("words")
    add_numbers(table, "bytes")
    table.add_row("several words that are folded", "123,456,789,012,345,678")
    file = io.StringIO()
    print_table(Console(file=file, width=10, color_system=None), table)
    assert "123,456,789,012,345,678" in file.getvalue()
    assert "several words that are folded" not in file.getvalue()


def test_a_long_name_makes_no_endless_line() -> None:
    record = replace(examples.record(), settings={"x" * 60_000: 1})
    file = io.StringIO()
    show.print_record(record, Console(file=file, width=80, color_system=None))
    assert max(map(len, file.getvalue().splitlines())) <= 160


def test_versions_are_whole_at_eighty_columns(log: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memladder", "frameworks", "--device", "cpu"],
        cwd=log.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    import torch

    assert f" {torch.__version__} " in done.stdout


def test_a_record_is_ascii_in_its_file() -> None:
    machine = replace(examples.MACHINE, device="Prozessor® ×")
    text = dumps(examples.record(environment=replace(examples.ENVIRONMENT, machine=machine)))
    assert text.isascii()
    assert json.loads(text)["environment"]["machine"]["device"] == "Prozessor® ×"


def test_make_test_runs_both_parts_and_fails_at_the_end(tmp_path: Path) -> None:
    """The recipe as it is, with a pytest that fails in the first part."""
    told = tmp_path / "told"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {told}\ncase "$*" in *tests/unit*) exit 1;; esac\nexit 0\n'
    )
    python.chmod(0o755)
    recipe = subprocess.run(
        ["make", "--dry-run", "--silent", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = recipe[recipe.index("failed=0") :]
    script = re.sub(r"\S*/bin/python", str(python), commands)
    done = subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert [re.findall(r"tests/\S+", line) for line in told.read_text().splitlines()] == [
        ["tests/unit"],
        ["tests/cpu", "tests/browser"],
    ]
