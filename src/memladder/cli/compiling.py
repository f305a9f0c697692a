"""`memladder compile` and `memladder run`."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.cli.actions import needed, progress_bar
from memladder.core.errors import UsageError
from memladder.core.files import (
    new_folder,
    open_new,
    open_regular,
    require_replaceable,
    write_atomic,
)
from memladder.core.units import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from memladder.engine.compile.compile import Result


def compile_model(
    model: Path,
    out: Path,
    *,
    engine: str,
    form: str,
    activation: str | None,
    kept: tuple[str, ...],
    budget: int | None,
) -> None:
    """Compile an ONNX file into a new folder. Nothing is left there if it can't be done.

    `budget`: bytes of the arena; the rest as in `CompileOptions`.
    """
    with needed("compile", "welder"):
        import onnx  # noqa: F401  (it is imported where a file is read)

        from memladder.engine.compile import arena, bundle, schedule
        from memladder.engine.compile.compile import CompileOptions, compile_file
        from memladder.engine.run import kernel_files

    options = CompileOptions(engine, form, activation, kept, budget)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is in use; name a new folder, or an empty one")
    found = compile_file(model, options)
    with new_folder(out) as part:
        with progress_bar("packing") as progress:
            bundle.pack(found, part / bundle.WEIGHTS, progress)
        write_atomic(part / bundle.PROGRAM, bundle.program_json(found))
        kernels = kernel_files.write(part)
        write_atomic(part / "schedule.md", schedule.markdown(found, model.name, options.engine))
        arena.draw(found.program, found.plan, part / "arena.svg")
    print(f"{_summary(found, out)}; {kernels}")


def _summary(found: Result, out: Path) -> str:
    steps = len(found.program.steps)
    return f"{out}: {steps} steps, arena {format_bytes(found.plan.nbytes)}, chunk {found.chunk}"


def run_folder(folder: Path, given: Path, out: Path, device: str | None, check: str) -> None:
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
