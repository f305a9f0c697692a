"""The Triton kernels of a compiled layer as files to read: the source of each function that a GPU
would run, with what it is specialised for.

    python -m memladder.engine.run.kernel_files DIR COMPUTE_CAPABILITY

In a process of its own, which needs no GPU: nothing is launched there, only noted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from operator import is_
from pathlib import Path
from types import ModuleType
from typing import Any

from memladder.core import children
from memladder.core.errors import UnavailableError
from memladder.core.text import clean
from memladder.engine.program.steps import Step

FOLDER = "kernels"
_NEWLINE = "\n"
# H100. Others get other cuts, and below 9.0 the general kernels.
CAPABILITY = 90
_NO_KERNEL = 3


def write(folder: Path) -> str:
    """Write `kernels/` of a compiled layer's folder; says how many there are, or why none: the
    layer then runs on the CPU alone."""
    if find_spec("triton") is None:
        return "no kernels for a GPU: Triton is not installed"
    command = children.module(__name__, folder, str(CAPABILITY))
    # Functions of the interpreter are others.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = children.run(command, env=env)
    if done.returncode == _NO_KERNEL:
        return f"no kernels for a GPU: {clean(done.stderr)}"
    assert done.returncode == 0, done.stderr
    return f"kernels for a GPU: {len(list((folder / FOLDER).iterdir()))}"


@dataclass(frozen=True)
class _Launch:
    function: Any
    grid: tuple[int, ...]
    constants: Mapping[str, Any]


def _main(folder: Path, capability: int) -> int:
    try:
        _write_all(folder, capability)
    except UnavailableError as error:
        sys.stderr.write(f"{error}\n")
        return _NO_KERNEL
    return 0


def _write_all(folder: Path, capability: int) -> None:
    import torch

    from memladder.engine.compile import bundle
    from memladder.engine.run.execute import Execution, arena_bytes

    launches: list[_Launch] = []
    _note_launches(capability, launches)
    from memladder.kernels import cuda

    compiled = bundle.load(folder / bundle.PROGRAM, folder / bundle.WEIGHTS)
    arena = torch.empty(arena_bytes(compiled.program, compiled.plan, cuda), dtype=torch.uint8)
    found: dict[str, tuple[_Launch, list[int], Step]] = {}
    for number, step in enumerate(compiled.program.steps):
        only = Execution(
            compiled.program, compiled.plan, compiled.weights, cuda, arena, only=partial(is_, step)
        )
        launches.clear()
        only.run()
        for launch in launches:
            key = f"{launch.function.__name__} {launch.constants}"
            numbers = found.setdefault(key, (launch, [], step))[1]
            numbers += [] if number in numbers else [number]
    (folder / FOLDER).mkdir()
    for number, (launch, steps, step) in enumerate(found.values(), 1):
        path = folder / FOLDER / f"{number:02}_{step.kernel}.py"
        path.write_text(_text(launch, steps, step, capability), encoding="utf-8")


def _note_launches(capability: int, launches: list[_Launch]) -> None:
    """From now on Triton's functions are noted and not launched, as on a GPU of that kind."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Absent:
        """What kernels ask a driver for before they are launched."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    def noted(self: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        constants = [name for name, p in zip(self.arg_names, self.params, strict=True)
                     if p.is_constexpr]  # fmt: skip

        def launch(*arguments: object, **named: object) -> None:
            given = dict(zip(self.arg_names, arguments, strict=False)) | named
            options = [name for name in named if name not in self.arg_names]
            values = {name: given[name] for name in (*constants, *options) if name in given}
            launches.append(_Launch(self, grid, values))

        return launch

    triton.runtime.driver.set_active(Absent())
    JITFunction.__getitem__ = noted


def _text(launch: _Launch, steps: list[int], step: Step, capability: int) -> str:
    function = launch.function
    names = ", ".join(step.weights.values()) or "no weights"
    shown = ", ".join(map(str, steps[:8])) + (" …" if len(steps) > 8 else "")
    constants = "\n".join(f"    {name} = {value!r}" for name, value in launch.constants.items())
    sources, values, modules = _needed(function)
    lines = [f"import {path} as {name}" for name, path in sorted(modules.items())]
    lines += [f"{name} = {value}" for name, value in sorted(values.items())]
    return f'''"""{step.kernel} ({names}): steps {shown} of program.json.

`{function.fn.__module__}.{function.__name__}` for compute capability {capability / 10}, as shipped;
`memladder tune` may have found a faster cut on a GPU. A grid is {launch.grid}, specialised for

{constants}

This file is for reading: what runs is the function in the module that is named above.
"""

{_NEWLINE.join(["import triton", *lines])}

{(_NEWLINE * 2).join(sources)}'''


def _needed(function: Any) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Sources of the function and of those that it calls, which come first; globals that they
    read, and modules."""
    from triton.runtime.jit import JITFunction

    sources: dict[str, str] = {}
    values: dict[str, str] = {}
    modules: dict[str, str] = {}

    def visit(one: Any) -> None:
        for name in _names(one.fn.__code__):
            known = one.fn.__globals__.get(name)
            if isinstance(known, JITFunction):
                if known.__name__ not in sources:
                    visit(known)
            elif isinstance(known, ModuleType) and known.__name__ != "triton":
                modules[name] = known.__name__
            elif known is not None:
                # Functions may read globals that are constants, and no others.
                own = getattr(known, "value", known)
                values[name] = repr(own) if own is known else f"tl.constexpr({own!r})"
        sources[one.__name__] = f"@triton.jit\n{one.src.rstrip()}\n"

    visit(function)
    return list(sources.values()), values, modules


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
