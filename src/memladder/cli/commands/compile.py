"""`memladder compile`: a layer from ONNX to a program, packed weights, a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memladder.cli.ending import needed
from memladder.cli.options import MAX_MIB, count
from memladder.cli.terminal import progress_bar
from memladder.core.errors import UsageError
from memladder.core.files import new_folder, write_atomic
from memladder.core.units import format_bytes

if TYPE_CHECKING:
    from memladder.engine.compile.compile import Result


def compile_layer(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A decoder layer as .onnx.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    engine: Annotated[str, typer.Option(metavar="welder|ladder")] = "ladder",
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="Of weights.")] = "fp16",
    activation: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Default: what goes with the weights.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Matrices that stay in fp16; may be repeated."),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="MIB", help="Of the arena; default: the knee.")
    ] = None,
) -> None:
    """Compile a layer from ONNX: program, packed weights, schedule."""
    budget = None
    if memory_budget is not None:
        budget = count("memory budget", memory_budget, MAX_MIB) << 20
    _compile(
        model,
        out,
        engine=engine,
        form=form,
        activation=activation,
        kept=tuple(keep or ()),
        budget=budget,
    )


def _compile(
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
