"""Tables on a terminal: texts are folded where it is narrow, numbers never."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

# What a folded column is given at the least, and what a column has around it.
_LEAST = 8
_AROUND = 3
# No number is longer; a name from a file may be.
_MOST = 64


def add_numbers(table: Table, *headers: str) -> None:
    """Add columns of numbers: to the right, and never cut or folded."""
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table as wide as its unfolded columns ask for, however narrow the terminal is."""
    least = sum(_width(column) + _AROUND for column in table.columns) + 1
    before = console.width
    console.width = max(before, least)
    try:
        console.print(table)
    finally:
        console.width = before


def _width(column: Column) -> int:
    if not column.no_wrap:
        return _LEAST
    lines = (line for cell in (column.header, *column.cells) for line in str(cell).splitlines())
    return min(max(map(cell_len, lines), default=0), _MOST)
