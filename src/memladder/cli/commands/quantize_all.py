"""`memladder quantize --all`: a whole checkpoint into a folder that runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from memladder.cli.console import plain_console
from memladder.cli.ending import needed
from memladder.core.units import mib

if TYPE_CHECKING:
    from memladder.engine.compile.whole import Tell
    from memladder.engine.packed.folder import Index, Packed

# So often a line says how far it is, where nobody's terminal shows a bar.
_EVERY_S = 10.0


def quantize_all(
    checkpoint: Path, out: Path, *, form: str, kept: tuple[str, ...], head_format: str
) -> None:
    """Pack all of a checkpoint, or what is missing of it; print what each file takes and loses."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with needed("quantize", "ladder"):
        from memladder.engine.compile import whole
        from memladder.engine.packed import checkpoint as checkpoints
        from memladder.engine.packed.folder import Options

    options = Options(form, kept, head_format)
    with _telling() as tell:
        index = whole.pack(checkpoints.open_all(checkpoint), options, out, tell)
    plain_console().print(_table(index))
    print(out)


@contextmanager
def _telling() -> Iterator[Tell]:
    """How far it is, and how long the rest will take, on stderr."""
    from rich.progress import Progress

    console = plain_console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("packing")
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )
        return
    began, at_first, last = time.monotonic(), -1, 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal at_first, last
        spent = time.monotonic() - began
        at_first = done if at_first < 0 else at_first
        if spent - last >= _EVERY_S and done > at_first:
            left = spent * (total - done) / (done - at_first)
            sys.stderr.write(f"{what}: {100 * done // total} %, {left:.0f} s to go\n")
            last = spent

    yield tell


def _table(index: Index) -> Table:
    table = Table("file", "format")
    for title in ("MiB", "bits/weight", "SQNR dB"):
        table.add_column(title, justify="right")
    for packed in index.layers:
        _add(table, packed)
    assert index.rest is not None
    _add(table, index.rest)
    files = (*index.layers, index.rest)
    nbytes = sum(packed.nbytes for packed in files)
    parameters = sum(packed.parameters for packed in files)
    table.add_section()
    table.add_row("total", "", f"{mib(nbytes):,.3f}", f"{8 * nbytes / parameters:.3f}", "")
    return table


def _add(table: Table, packed: Packed) -> None:
    kinds = ", ".join(dict.fromkeys(matrix.format for matrix in packed.matrices))
    sqnr = "exact" if packed.sqnr_db is None else f"{packed.sqnr_db:.2f}"
    size = f"{mib(packed.nbytes):,.3f}"
    table.add_row(packed.file, kinds, size, f"{packed.bits_per_weight:.3f}", sqnr)
