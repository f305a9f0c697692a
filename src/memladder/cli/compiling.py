"""`memladder compile` and `memladder run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.cli.actions import needed, progress_bar
from memladder.core.errors import UsageError
from memladder.core.files import new_folder, write_atomic
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


def run_folder(folder: Path, given: Path, out: Path, device: str | None) -> None:
    """Run a compiled layer, from one .npy file to another; `device` as in `load_layer`."""
    with needed("run", "ladder"):
        import numpy as np
        import torch

        from memladder.engine.run.layer import load_compiled

    layer, shape = load_compiled(folder, device)
    states = _states(given)
    wanted = (shape.batch_size, shape.seq_len, layer.packed.form.fused.hidden_size)
    if states.shape != wanted:
        raise UsageError(f"{given}: shape {list(states.shape)}; {list(wanted)} wanted")
    found = layer(torch.from_numpy(states).to(layer.device)).cpu().numpy()
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
