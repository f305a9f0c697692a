"""`memladder compile` and `memladder run`, as a user types them."""

from __future__ import annotations

import ast
import os
import random
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from memladder import load_layer, models
from memladder.cli.commands import run
from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.models import onnx_export
from tests.unit.command import Command, Done
from tests.unit.onnx_models import save

ROOT = Path(__file__).parents[3]
# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

MATRIX = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float16)
NODES = [("MatMul", ("x", "w"), "m"), ("Relu", "m", "r"), ("Add", ("r", "x"), "y")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "layer.onnx", NODES, {"w": MATRIX}, dtype=TensorProto.FLOAT16)


def test_a_layer_is_compiled_and_run(memladder: Command, model: Path, tmp_path: Path) -> None:
    done = memladder("compile", model, "--engine", "welder", "--out", "made")
    assert (done.code, done.err) == (0, "")
    assert done.out == "made: 1 steps, arena 0.0 MiB, chunk 512; kernels for a GPU: 1\n"
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    weights = ["weights.safetensors", "weights.safetensors.sha256"]
    assert made == ["arena.svg", "kernels", "program.json", "schedule.md", *weights]
    states = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", states)
    arguments = ("run", "made", "--device", "cpu", "--input", "x.npy", "--output")
    assert memladder(*arguments, "y.npy") == Done(0, "", "")
    found = np.load(tmp_path / "y.npy")
    x, weight = states.astype(np.float16).astype(np.float64), MATRIX.astype(np.float64)
    np.testing.assert_allclose(found, np.maximum(x @ weight, 0) + x, rtol=1e-3, atol=1e-3)
    assert found.dtype == np.float32
    # The same layer by `load_layer`, at the shape that it was compiled for and at no other.
    layer = load_layer(tmp_path / "made/weights.safetensors", device="cpu")
    assert torch.equal(layer(torch.from_numpy(states)), torch.from_numpy(found))
    with pytest.raises(UsageError, match="compiled for 2x5; 2x4 was asked for"):
        layer(torch.from_numpy(states[:, :4]))


def test_the_kernels_of_a_gpu_are_written_down(
    memladder: Command, tmp_path: Path, cache_dir: Path
) -> None:
    model = onnx_export.ensure(models.narrow_config("llama"), cache_dir, Workload(1, 1), 0)
    assert memladder("compile", model, "--format", "int4", "--out", "made").code == 0
    files = sorted((tmp_path / "made/kernels").iterdir())
    names = [path.stem.partition("_")[2] for path in files]
    assert names[:4] == ["rms_norm", "qkv", "attention", "matmul"]
    for path in files:
        text = path.read_text()
        functions = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        # The kernel itself is the last one; what it calls comes before.
        module, name = re.search(r"`memladder\.kernels\.cuda\.(\w+)\.(\w+)`", text).groups()
        assert functions[-1] == name
        assert (ROOT / f"src/memladder/kernels/cuda/{module}.py").exists()
    qkv = files[1].read_text()
    assert "qkv (key, value, query): steps 1 of program.json" in qkv
    assert "    BITS = 4\n" in qkv


def test_headers_of_inputs_that_were_changed(model: Path, tmp_path: Path) -> None:
    """Nothing but one line, and no memory beyond the input's own, whatever the header says."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 5, 8), np.float32))
    whole = path.read_bytes()
    pick = random.Random(0)
    read = 0
    for _ in range(500):
        changed = bytearray(whole)
        for _ in range(pick.randint(1, 4)):
            changed[pick.randrange(128)] = pick.choice([pick.randrange(256), *b"0123456789(),'<>f"])
        path.write_bytes(changed)
        with suppress(UsageError):
            assert run._states(path, (2, 5, 8)).shape == (2, 5, 8)
            read += 1
    assert read < 300


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
        (["same.onnx", "--out", "o"], "same.onnx: the output is the hidden states as they are"),
    ],
)
def test_compile_refuses_in_one_line(
    memladder: Command, arguments: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "text.onnx").write_text("no model")
    save(tmp_path / "same.onnx", [("Identity", "x", "y")])
    before = sorted(tmp_path.rglob("*"))
    done = memladder("compile", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("memladder: error: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_run_refuses_in_one_line(memladder: Command, model: Path, tmp_path: Path) -> None:
    assert memladder("compile", model, "--out", "made").code == 0
    np.save(tmp_path / "wide.npy", np.zeros((2, 5, 9), np.float16))
    np.save(tmp_path / "whole.npy", np.zeros((2, 5, 8), np.int64))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "large.npy", np.full((2, 5, 8), 1e6, np.float32))
    np.save(tmp_path / "right.npy", np.zeros((2, 5, 8), np.float16))
    whole = (tmp_path / "right.npy").read_bytes()
    for name, content in (("empty", b""), ("head", whole[:100]), ("short", whole[:-2])):
        (tmp_path / f"{name}.npy").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "program.json")
    for folder, given, said in (
        ("none", "wide.npy", "none/program.json: no such file"),
        ("made", "none.npy", "none.npy: no such file"),
        ("made", "wide.npy", "wide.npy: shape [2, 5, 9]; [2, 5, 8] wanted"),
        ("made", "whole.npy", "whole.npy: int64; float16 or float32 wanted"),
        ("made", "object.npy", "object.npy: not a .npy file of numbers"),
        ("made", "layer.onnx", "layer.onnx: not a .npy file of numbers"),
        ("made", "empty.npy", "empty.npy: not a .npy file of numbers"),
        ("made", "head.npy", "head.npy: not a .npy file of numbers"),
        ("made", "short.npy", "short.npy: 79 numbers; 80 wanted"),
        ("made", "large.npy", "hidden states hold 1e+06; the layer computes in float16"),
        ("made", "pipe", "pipe: not a file, but a pipe"),
        ("made", "/dev/zero", "/dev/zero: not a file, but a device"),
        ("made", ".", ".: not a file, but a folder"),
        ("made", "x" * 300, "File name too long"),
        ("piped", "wide.npy", "piped/program.json: not a file, but a pipe"),
    ):
        done = memladder("run", folder, "--input", given, "--output", "y.npy", "--device", "cpu")
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert done.err.count("\n") == 1
        assert not (tmp_path / "y.npy").exists()
    arguments = ("run", "made", "--input", "wide.npy", "--output", "y.npy", "--device")
    for device, said in (("cuda:99", "cuda:99 can't be used; here are: cpu, "), ("tpu", "'tpu'")):
        done = memladder(*arguments, device)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
