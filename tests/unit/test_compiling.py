"""`memladder compile` and `memladder run`, as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from tests.unit.onnx_models import save

ROOT = Path(__file__).parents[2]
MATRIX = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float16)
NODES = [("MatMul", ("x", "w"), "m"), ("Relu", "m", "r"), ("Add", ("r", "x"), "y")]


def memladder(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memladder", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "layer.onnx", NODES, {"w": MATRIX}, dtype=TensorProto.FLOAT16)


def test_a_layer_is_compiled_and_run(model: Path, tmp_path: Path) -> None:
    done = memladder("compile", model, "--engine", "welder", "--out", "made", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "made: 1 steps, arena 0.0 MiB, chunk 512\n"
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert made == ["arena.svg", "program.json", "schedule.md", "weights.safetensors"]
    states = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", states)
    done = memladder("run", "made", "--input", "x.npy", "--output", "y.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = np.load(tmp_path / "y.npy")
    x, weight = states.astype(np.float16).astype(np.float64), MATRIX.astype(np.float64)
    np.testing.assert_allclose(found, np.maximum(x @ weight, 0) + x, rtol=1e-3, atol=1e-3)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.onnx", "--out", "o"], "none.onnx: no such file"),
        (["layer.onnx", "--out", "used"], "used is in use; name a new folder, or an empty one"),
        (["layer.onnx", "--out", "layer.onnx"], "layer.onnx is in use"),
        (["layer.onnx", "--out", "o", "--engine", "tvm"], "unknown engine 'tvm'"),
        (["layer.onnx", "--out", "o", "--format", "int3"], "int3"),
        (["layer.onnx", "--out", "o", "--memory-budget", "0"], "memory budget '0'"),
        (["layer.onnx", "--out", "/proc/o"], "cannot write /proc/o"),
        (["text.onnx", "--out", "o"], "text.onnx: not an ONNX file"),
    ],
)
def test_compile_refuses_in_one_line(
    arguments: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "text.onnx").write_text("no model")
    before = sorted(tmp_path.rglob("*"))
    done = memladder("compile", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("memladder: error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_run_refuses_in_one_line(model: Path, tmp_path: Path) -> None:
    assert memladder("compile", model, "--out", "made", cwd=tmp_path).returncode == 0
    np.save(tmp_path / "wide.npy", np.zeros((2, 5, 9), np.float16))
    np.save(tmp_path / "whole.npy", np.zeros((2, 5, 8), np.int64))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    for folder, given, said in (
        ("none", "wide.npy", "none/program.json: No such file or directory"),
        ("made", "none.npy", "none.npy: No such file or directory"),
        ("made", "wide.npy", "wide.npy: shape [2, 5, 9]; [2, 5, 8] wanted"),
        ("made", "whole.npy", "whole.npy: int64; float16 or float32 wanted"),
        ("made", "object.npy", "object.npy: not a .npy file of numbers"),
        ("made", "layer.onnx", "layer.onnx: not a .npy file of numbers"),
    ):
        done = memladder("run", folder, "--input", given, "--output", "y.npy", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "y.npy").exists()
