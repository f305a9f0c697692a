"""Children import nothing from the working directory, and nobody else starts any."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memladder.core import children

SOURCE = Path(children.__file__).parents[1]
PROCESSES = {"subprocess", "multiprocessing", "pty", "asyncio"}
ENDS = ("l", "lp", "v", "vp")
STARTERS = {
    *("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp"),
    *(
        f"{kind}{end}"
        for kind in ("exec", "spawn")
        for end in ["l", "le", "lp", "lpe", "v", "ve", "vp", "vpe"]
    ),
}
# The helper, and the guard, which forks a command that the helper has made.
ALLOWED = {
    "core/children.py": {"subprocess.run", "subprocess.Popen"},
    "meter/inside/guard.py": {"os.fork", "os.execv"},
}


def starts(tree: ast.AST) -> set[str]:
    """Calls of a module that start a process, whatever names they were imported under."""
    names: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.asname or one.name: one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            module, _, name = ast.unparse(node.func).rpartition(".")
            whole = f"{names.get(module, module)}.{name}" if module else names.get(name, name)
            top, _, last = whole.rpartition(".")
            if top.partition(".")[0] in PROCESSES or (top == "os" and last in STARTERS):
                found.add(whole)
    return found


def test_a_start_is_found_under_any_name() -> None:
    text = "import subprocess as s, os\nfrom os import execv as e\ns.call([]); e(1); os.system('')"
    assert starts(ast.parse(text)) == {"subprocess.call", "os.execv", "os.system"}


def test_one_helper_starts_every_child() -> None:
    for path in SOURCE.rglob("*.py"):
        name = str(path.relative_to(SOURCE))
        text = path.read_text()
        assert starts(ast.parse(text)) == ALLOWED.get(name, set()), name
        assert name == "core/start.py" or '"-m"' not in text, name


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose files say so when they run, under names that a start may import."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    stdlib = ("runpy", "json", "argparse", "types", "pkgutil", "encodings", "importlib")
    for name in (*stdlib, "memladder", "torch", "pip", "venv", "sitecustomize"):
        (folder / f"{name}.py").write_text("import sys; open('RAN', 'w'); sys.exit(3)\n")
    return folder


def old_python() -> str | None:
    """A Python 3.10, which knows no safe path."""
    found = shutil.which("python3.10")
    known = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))
    return str(known[0]) if known else found


@pytest.mark.parametrize("python", [sys.executable, old_python()])
def test_nothing_of_the_working_directory_runs(
    python: str | None, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if python is None:
        pytest.skip("there is no Python 3.10 here")
    monkeypatch.chdir(hostile)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    done = children.run(children.module("json.tool", python=python), given='{"a":  1}')
    assert (done.returncode, done.stdout.split()) == (0, ["{", '"a":', "1", "}"]), done.stderr
    assert not (hostile / "RAN").exists()


def test_a_python_that_knows_no_safe_path_is_safe_too(hostile: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = children.module("memladder.environments.probe", "nothing", "nothing", "cpu")
    done = subprocess.run(command, cwd=hostile, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"nothing not installed"' in done.stdout
    assert not (hostile / "RAN").exists()


def test_memladder_itself_takes_nothing_from_there(hostile: Path) -> None:
    (hostile / "memladder.py").unlink()
    for name in ("runpy", "encodings", "types", "pkgutil", "importlib"):
        # Python itself needs these before it runs anything of ours.
        (hostile / f"{name}.py").unlink()
    for arguments in (["--version"], ["frameworks", "--device", "cpu"]):
        done = subprocess.run(
            [sys.executable, "-m", "memladder", *arguments],
            cwd=hostile,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert not (hostile / "RAN").exists()
