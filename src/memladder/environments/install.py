"""Making environments from pinned requirements, pointing to those that are there, removing them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memladder import frameworks
from memladder.core import children, serial
from memladder.core.errors import UsageError
from memladder.core.files import locked, require_own, writable_folder, write_atomic
from memladder.core.text import clean
from memladder.environments import interpreter, sources
from memladder.environments.ask import Answer, ask
from memladder.environments.interpreter import Given, Interpreter, Made

_REQUIREMENTS = Path(frameworks.__file__).with_name("requirements")
_INSTALLED = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)
_ERROR = re.compile(r"^\s*(ERROR|error|×)\W+(.*)")

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Listed:
    """One framework's environment as `memladder env list` shows it."""

    name: str
    interpreter: Interpreter
    is_current: bool
    can_be_made: bool


def requirements(name: str, device: str) -> Path:
    """The pinned requirements of an environment on a device; CUDA's own where these differ.

    Raises UsageError where memladder ships none.
    """
    kind, _, _ = device.partition(":")
    for path in (_REQUIREMENTS / f"{name}-{kind}.txt", _REQUIREMENTS / f"{name}.txt"):
        if path.is_file():
            return path
    raise UsageError(f"there are no pinned requirements for {name}; known: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """The environments that can be made, sorted."""
    found = {path.stem.partition("-")[0] for path in _REQUIREMENTS.glob("*.txt")}
    return tuple(sorted(found))


def digest(path: Path) -> str:
    """8 hexadecimal digits of what a requirements file pins; comments do not count."""
    lines = (
        line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()
    )
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:8]


def create(name: str, device: str, base: Path | None, on_line: OnLine) -> Path:
    """Make an environment; its interpreter. `base` is the Python to make it of, by default ours.

    An interpreter that was given before is forgotten. `on_line` gets what the installer says. The
    environment is there as a whole or, whatever happens, not at all. Raises UsageError where it is
    there already or can't be made, LockedError where another process makes it.
    """
    wanted = requirements(name, device)
    folder = interpreter.root() / name
    with _locked(name):
        if interpreter.made(name) is not None:
            raise UsageError(
                f"the environment {name} is there already; "
                f"to make it anew: memladder env remove {name}"
            )
        # What a creation left that was killed.
        _delete(folder)
        try:
            _install(folder, base or Path(sys.executable), wanted, on_line)
            python = interpreter.python_of(name)
            made = Made(digest(wanted), _installed(python))
            _note(folder / interpreter.MADE_FILE, made)
        except BaseException:
            _delete(folder)
            raise
        # The last command counts.
        interpreter.given_file(name).unlink(missing_ok=True)
    return python


def use(name: str, text: str) -> Interpreter:
    """Let the workers of `name` start with an interpreter that is there. Raises UsageError."""
    python = interpreter.located(text)
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise UsageError(f"{python} is not an interpreter")
    found = Interpreter(python, "given")
    answer = ask(found, _keys(name)[0], "cpu")
    if answer.python == "unknown":
        raise UsageError(answer.availability.reason or f"{python} can't run workers")
    _note(interpreter.given_file(name), Given(str(python)))
    return found


def answer(name: str, device: str) -> Answer:
    """What the environment's interpreter says of its framework on a device."""
    key = _keys(name)[0]
    return ask(interpreter.chosen(key), key, device)


def remove(name: str) -> list[str]:
    """Forget a given interpreter and delete a made environment; what was done, in words.

    Raises UsageError where there is neither.
    """
    done = []
    with _locked(name):
        given = interpreter.given(name)
        if given is not None:
            interpreter.given_file(name).unlink()
            done.append(f"{name} no longer uses {given}; nothing was deleted there")
        folder = interpreter.root() / name
        if folder.is_dir():
            _delete(folder)
            done.append(f"deleted {folder}")
    if not done:
        raise UsageError(f"{name} has no environment of its own")
    return done


def listed() -> tuple[Listed, ...]:
    """All environments: those that are used, and those that could be made."""
    known = {interpreter.family(key) for key in frameworks.names()} | set(names())
    return tuple(_listed(name) for name in sorted(known))


def _note(path: Path, what: Made | Given) -> None:
    write_atomic(path, serial.dumps(what, indent=1) + "\n")


def _listed(name: str) -> Listed:
    found = interpreter.chosen(_keys(name)[0])
    shipped = {digest(path) for path in _REQUIREMENTS.glob(f"{name}*.txt")}
    made = found.label is not None and found.label.startswith("made")
    current = not made or (found.label or "").rpartition(" ")[2] in shipped
    return Listed(name, found, current, name in names())


def _keys(name: str) -> list[str]:
    """The frameworks that share an environment."""
    return [key for key in frameworks.names() if interpreter.family(key) == name] or [name]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    root = writable_folder(interpreter.root())
    # Else the environment would be made, and then be refused.
    require_own(root, root.parent)
    with locked(root / f".{name}.lock", f"another memladder works on the environment {name}"):
        yield


def _install(folder: Path, base: Path, wanted: Path, on_line: OnLine) -> None:
    # On the PATH, or beside our own Python, whose environment need not be activated.
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    python = str(folder / "bin" / "python")
    if uv is not None:
        told = sources.for_uv(base)
        _run("uv", [uv, "venv", "--python", str(base), str(folder)], on_line)
        # Compiled as pip does it: else the first process that is measured would.
        told += ["--compile-bytecode", "-r", str(wanted)]
        _run("uv", [uv, "pip", "install", "--python", python, *told], on_line)
    else:
        _run("venv", children.module("venv", folder, python=base), on_line)
        quiet = ("--disable-pip-version-check", "--progress-bar", "off", "--no-input")
        install = children.module("pip", "install", *quiet, "-r", wanted, python=python)
        _run("pip", install, on_line)


def _installed(python: Path) -> dict[str, str]:
    """Versions of all that an environment has, by name. Raises UsageError."""
    done = children.run([str(python), "-I", "-c", _INSTALLED])
    if done.returncode != 0:
        raise UsageError(f"{python} exits with status {done.returncode}: {clean(done.stderr)}")
    return dict(sorted(json.loads(done.stdout).items()))


def _run(tool: str, command: list[str], on_line: OnLine) -> None:
    """Run an installer to its end. Raises UsageError with the reason that it gave."""
    lines: list[str] = []
    try:
        process = children.start(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # uv would read a uv.toml of the working directory, which may name any index.
            env={**Interpreter(Path(command[0]), "made").environ(), **_uv_project()},
        )
    except OSError as error:
        raise UsageError(f"{command[0]} can't be started: {error.strerror or error}") from None
    with process:
        try:
            assert process.stdout is not None
            for raw in process.stdout:
                line = clean(raw.decode(errors="replace"))
                if line:
                    lines.append(line)
                    on_line(line)
            status = process.wait()
        except BaseException:
            # The installer and what it has started: they have a process group of their own.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status != 0:
        raise UsageError(f"{tool} exits with status {status}: {_reason(lines)}")


def _uv_project() -> dict[str, str]:
    return {} if "UV_PROJECT" in os.environ else {"UV_PROJECT": str(interpreter.root())}


def _reason(lines: list[str]) -> str:
    """The first line that calls itself an error, else the last."""
    found = [match[2] for line in lines if (match := _ERROR.match(line))]
    return (found or lines[-1:] or ["it says nothing"])[0].strip()[:300]


def _delete(folder: Path) -> None:
    """Delete a made environment, or the rest of one; its mark goes first."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link; memladder made no such thing")
    try:
        (folder / interpreter.MADE_FILE).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"cannot delete {folder}: {error.strerror or error}") from None
