"""CONTRIBUTING's table of where things are, against the files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
FIRST = LINES.index("| I want to | open |") + 2
ROWS = [line for line in LINES[FIRST : LINES.index("", FIRST)] if line.startswith("| ")]


def test_the_table_is_found() -> None:
    assert len(ROWS) >= 20


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_names_exists(row: str) -> None:
    named = re.findall(r"`([\w./<>-]+)`", row.split("|")[2])
    assert named
    for path in named:
        folder = ROOT if path.split("/")[0] in ("docs", "tests") else ROOT / "src" / "memladder"
        if path.endswith("/"):
            assert (folder / path).is_dir()
        else:
            assert list(folder.glob(path.replace("<key>", "[a-z]*"))), path
