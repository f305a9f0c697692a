"""`memladder run`: a compiled layer."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memladder.cli.ending import needed
from memladder.core.errors import UsageError
from memladder.core.files import open_new, open_regular, require_replaceable

if TYPE_CHECKING:
    import numpy as np


def run_layer(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `compile` has written.")],
    given: Annotated[Path, typer.Option("--input", metavar="X.NPY", help="Hidden states.")],
    out: Annotated[Path, typer.Option("--output", metavar="Y.NPY")],
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="Default: a GPU where there is one.")
    ] = None,
    check: Annotated[
        str, typer.Option(metavar="output|steps|none", help="Where to look for NaN and infinity.")
    ] = "output",
) -> None:
    """Run a compiled layer on a GPU, or on the CPU."""
    _run(folder, given, out, device, check)


def _run(folder: Path, given: Path, out: Path, device: str | None, check: str) -> None:
    """Run a compiled layer, from one .npy file to another; `device`, `check` as in `load_layer`."""
    with needed("run", "ladder"):
        import numpy as np
        import torch

        from memladder.engine.run.layer import load_compiled

    require_replaceable(out)
    layer, shape = load_compiled(folder, device, check)
    wanted = (shape.batch_size, shape.seq_len, layer.packed.form.fused.hidden_size)
    states = torch.from_numpy(_states(given, wanted))
    found = layer(states.to(layer.device)).cpu().numpy()
    part = out.with_name(f".{out.name}.{os.getpid()}.npy")
    try:
        with open_new(part) as file:
            np.save(file, found)
        part.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _states(path: Path, wanted: tuple[int, ...]) -> np.ndarray:
    """The numbers in a .npy file, of which nothing but a header is read before it fits."""
    import numpy as np
    from numpy.lib import format as npy

    with open_regular(path) as file:
        try:
            reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            shape, by_column, dtype = reader[npy.read_magic(file)](file)
        except Exception:
            # A library's parser: any way in which it fails is the same to the user.
            dtype = np.dtype(object)
        if dtype.hasobject:
            raise UsageError(f"{path}: not a .npy file of numbers")
        if dtype not in (np.float16, np.float32):
            raise UsageError(f"{path}: {dtype}; float16 or float32 wanted")
        if shape != wanted:
            raise UsageError(f"{path}: shape {list(shape)}; {list(wanted)} wanted")
        count = math.prod(shape)
        numbers = np.fromfile(file, dtype, count)
    if len(numbers) != count:
        raise UsageError(f"{path}: {len(numbers)} numbers; {count} wanted")
    return numbers.reshape(shape, order="F" if by_column else "C")
