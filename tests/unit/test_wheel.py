"""The wheel that the sdist makes, in an environment of its own, far from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from memladder import __version__

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "uv", "build", "--no-progress", "--out-dir", out, ROOT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_both_hold_the_data(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as opened:
        files = set(opened.namelist())
    source = ROOT / "src"
    tracked = run("git", "ls-files", "src", cwd=ROOT).split()
    assert {str((ROOT / name).relative_to(source)) for name in tracked} <= files
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CITATION.cff", "run_all.py", "Makefile", "mkdocs.yml"} <= names
    assert {"results/h100.json", "tests/unit/test_wheel.py", "docs/index.md"} <= names


def test_it_works_where_the_repository_is_not(built: tuple[Path, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    own = tmp_path / "venv/bin"
    run(own / "python", "-m", "pip", "install", "--quiet", built[1], cwd=tmp_path)
    assert run(own / "memladder", "--version", cwd=tmp_path) == f"memladder {__version__}\n"
    where = run(own / "python", "-c", "import memladder; print(memladder.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    run(own / "memladder-run-all", "--output_dir", "drawn", cwd=tmp_path)
    assert (tmp_path / "drawn/png/memory_usage_a100.png").read_bytes().startswith(b"\x89PNG")
    fits = run(own / "memladder", "fit", "--model", "llama", "--gpu", "H100", cwd=tmp_path)
    assert "predicted: fits" in fits
    known = run(own / "memladder", "frameworks", "--device", "cpu", cwd=tmp_path)
    assert "pip install" in " ".join(known.split())
    done = subprocess.run(
        [own / "memladder-measure-memory", "--framework", "pytorch", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    # No torch here: a status and no number, in a line.
    assert done.returncode != 0
    assert "unavailable" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
