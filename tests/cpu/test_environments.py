"""Workers in interpreters that have nothing, or only what a framework's requirements pin."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memladder import frameworks, models
from memladder.checks.calibration import calibrate
from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.core.units import MIB
from memladder.environments import ask, install, interpreter, sources
from memladder.frameworks._shared.base import Job
from memladder.meter.outside import runner


def pythons() -> list[str]:
    """This Python, and the oldest that workers support, where it is installed."""
    oldest = shutil.which("python3.10")
    if oldest and subprocess.run([oldest, "-c", ""], capture_output=True).returncode == 0:
        return [sys.executable, oldest]
    return [sys.executable]


@pytest.fixture(params=pythons(), ids=lambda path: Path(path).name)
def bare(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that has nothing but the standard library."""
    monkeypatch.setenv("MEMLADDER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bare"
    subprocess.run([request.param, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def test_a_worker_needs_nothing_but_the_standard_library(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLADDER_PYTHON_KNOWN", str(bare))
    # A module in the working directory must not come first.
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("json", "memladder", "runpy", "gc", "traceback", "pip", "torch"):
        (hostile / f"{name}.py").write_text("open('RAN', 'w'); raise SystemExit('the wrong one')")
    monkeypatch.chdir(hostile)
    (reading,) = calibrate("cpu", tmp_path / "calibration.log", [64 * MIB])
    assert reading.holds
    monkeypatch.setenv("MEMLADDER_PYTHON_ONNXRUNTIME", str(bare))
    found = ask.availability("onnxruntime", frameworks.get("onnxruntime"), "cpu")
    assert found.reason == "numpy not installed"
    assert sources.for_uv(bare) == []
    assert not (hostile / "RAN").exists()
    # The worker was that interpreter: memladder came to it through the link.
    assert (tmp_path / "cache" / "source").is_dir()


def test_our_packages_do_not_reach_another_interpreter(bare: Path) -> None:
    code = (
        "import memladder.meter.inside.worker, importlib.util as u;"
        "print([name for name in ('numpy', 'typer', 'psutil', 'pytest') if u.find_spec(name)])"
    )
    own = interpreter.Interpreter(bare, "given").environ()
    done = subprocess.run([str(bare), "-c", code], env=own, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_environment_is_asked_for_what_it_has(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = frameworks.get("onnxruntime")
    assert ask.availability("onnxruntime", framework, "cpu").available
    monkeypatch.setenv("MEMLADDER_PYTHON_ONNXRUNTIME", str(bare))
    found = ask.availability("onnxruntime", framework, "cpu")
    assert not found.available
    assert found.reason == "numpy not installed"
    python, packages = ask.versions("onnxruntime", framework, "cpu")
    assert packages == {}
    version = subprocess.run([str(bare), "--version"], capture_output=True, text=True).stdout
    assert f"Python {python}" == version.strip()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", ["onnxruntime", pytest.param("bitsandbytes", marks=pytest.mark.slow)]
)
def test_an_environment_is_made_from_the_registry(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLADDER_CACHE", str(tmp_path / "cache"))
    python = install.create(name, "cpu", None, lambda _: None)
    # Not by pip, which takes three times as long.
    assert "uv = " in (python.parents[1] / "pyvenv.cfg").read_text()

    made = interpreter.made(name)
    assert made is not None
    pins = install.requirements(name, "cpu").read_text().splitlines()
    for pin in (line for line in pins if "==" in line):
        package, _, version = pin.partition("==")
        assert made.packages[package].partition("+")[0] == version

    keys = [key for key in frameworks.names() if interpreter.family(key) == name]
    for key in keys:
        framework = frameworks.get(key)
        assert ask.availability(key, framework, "cpu").available
        options = {
            "limits": runner.Limits(timeout_s=600.0),
            "log_path": tmp_path / "worker.log",
        }
        verification = runner.verify(
            key, framework, "cpu", cache_dir=tmp_path / "cache", shapes=[Workload(2, 3)], **options
        )
        assert verification.agrees

        case = Case("llama", key, Workload(2, 3), "cpu")
        job = Job(case, models.narrow_config("llama"), tmp_path / "cache")
        record = runner.measure(job, framework, repeats=1, **options)
        assert record.status is Status.MEASURED, record.reason
        assert record.steady_bytes is not None
        assert record.steady_bytes > framework.weight_bytes(job)

        label = f"made from {made.requirements}"
        assert verification.environment.interpreter == label
        assert record.environment.interpreter == label
    assert keys
    install.remove(name)
    assert not python.exists()
