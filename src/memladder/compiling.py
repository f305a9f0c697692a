"""`memladder compile` and `memladder run`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.actions import needed, progress_bar
from memladder.errors import UsageError
from memladder.files import write_atomic
from memladder.units import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from memladder.engine.compiler.compile import Result


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

    `budget`: bytes of the arena; the rest as in `Options`.
    """
    with needed("compile", "welder"):
        import onnx  # noqa: F401  (it is imported where a file is read)

        from memladder.engine.compiler import arena, bundle, schedule
        from memladder.engine.compiler.compile import Options, compile_file

    options = Options(engine, form, activation, kept, budget)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is in use; name a new folder, or an empty one")
    found = compile_file(model, options)
    with _new_folder(out) as part:
        with progress_bar("packing") as progress:
            bundle.pack(found, part / bundle.WEIGHTS, progress)
        write_atomic(part / bundle.PROGRAM, bundle.program_json(found))
        write_atomic(part / "schedule.md", schedule.markdown(found, model.name, options.engine))
        arena.draw(found.program, found.plan, part / "arena.svg")
    print(_summary(found, out))


def _summary(found: Result, out: Path) -> str:
    steps = len(found.program.steps)
    return f"{out}: {steps} steps, arena {format_bytes(found.plan.nbytes)}, chunk {found.chunk}"


def run_folder(folder: Path, given: Path, out: Path) -> None:
    """Run a compiled layer on the CPU, from one .npy file to another."""
    with needed("run", "ladder"):
        import numpy as np
        import torch

        from memladder.engine.compiler import bundle
    from memladder.engine.execute import Execution, arena_bytes
    from memladder.kernels import naive

    compiled = bundle.load(folder / bundle.PROGRAM, folder / bundle.WEIGHTS)
    states = _states(given)
    width = next(b.columns for b in compiled.program.buffers if b.name == compiled.program.input)
    wanted = (compiled.shape.batch_size, compiled.shape.seq_len, width)
    if states.shape != wanted:
        raise UsageError(f"{given}: shape {list(states.shape)}; {list(wanted)} wanted")
    size = arena_bytes(compiled.program, compiled.plan, naive)
    memory = torch.empty(size, dtype=torch.uint8)
    execution = Execution(compiled.program, compiled.plan, compiled.weights, naive, memory)
    execution.input.copy_(torch.from_numpy(states.astype(np.float16)).view(-1, width))
    with torch.inference_mode():
        execution.run()
    found = execution.output.numpy().reshape(wanted).astype(states.dtype)
    part = out.with_name(f".{out.name}.{os.getpid()}.npy")
    try:
        np.save(part, found)
        part.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _states(path: Path) -> np.ndarray:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path}: not a .npy file of numbers") from None
    if not isinstance(found, np.ndarray) or found.dtype not in (np.float16, np.float32):
        kind = getattr(found, "dtype", "an archive")
        raise UsageError(f"{path}: {kind}; float16 or float32 wanted")
    return found


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all went well, and is removed otherwise."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if out.exists():
            out.rmdir()
        part.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
