"""ONNX files that can't be compiled: one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from memladder.core.errors import GraphError
from memladder.engine.frontend import convert, onnx_file
from memladder.engine.graph.evaluate import evaluate
from tests.unit.onnx_models import save

IDENTITY = [("Identity", "x", "y")]


def refused(path: Path, said: str) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        convert.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "none.onnx: no such file")
    refused(tmp_path, "not a file")
    for number, content in enumerate((b"", b"hello, this is text", b"\x08\x07" * 50)):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        refused(path, "not an ONNX file")


def test_shapes_that_are_left_open(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", IDENTITY, shape=(2, "tokens", 8))
    refused(path, r"axis 1 of input 'x' is dynamic \(tokens\); export the layer at the shape")
    refused(save(tmp_path / "m.onnx", IDENTITY, shape=(2, 8)), r"input 'x' is \[2, 8\]")


def test_types_that_are_unknown(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", IDENTITY, dtype=TensorProto.DOUBLE)
    refused(path, "input 'x' is double; float16, bfloat16, float32 are known")
    nodes = [("Cast", "x", "i", {"to": TensorProto.INT8}), ("Identity", "i", "y")]
    refused(save(tmp_path / "m.onnx", nodes), "unsupported type int8 of operator Cast 'cast_0'")


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Conv", ("x", "kernel"), "y")], "unsupported operator Conv 'conv_0'"),
        ([("Softmax", "x", "y")], "operator Softmax 'softmax_0': a softmax of something else"),
        ([("MatMul", ("x", "w3"), "y")], "operator MatMul 'matmul_0': a product that is no linear"),
        ([("Reshape", ("x", "torn"), "y")], "operator Reshape 'reshape_0': .* tears tokens apart"),
        ([("Add", ("x", "places"), "y")], "operator Add 'add_0': numbers by position"),
        ([("Identity", "w", "y")], "the output 'y' does not depend on the hidden states"),
        ([("MatMul", ("x", "w"), "y")], r"the output 'y' is \(2, 5, 4\), the input \(2, 5, 8\)"),
    ],
)
def test_operators_that_are_not_compiled(nodes: Any, said: str, tmp_path: Path) -> None:
    constants = {
        "w": np.ones((8, 4), np.float32),
        "w3": np.ones((2, 8, 8), np.float32),
        "kernel": np.ones((3, 5, 1), np.float32),
        "torn": np.array([5, 2, 8]),
        "places": np.arange(5, dtype=np.float32).reshape(5, 1),
    }
    refused(save(tmp_path / "m.onnx", nodes, constants), said)


def external(path: Path, location: str, offset: int = 0) -> Path:
    """The model's weight as a reference into a file."""
    save(path, [("MatMul", ("x", "w"), "y")], {"w": np.eye(8, dtype=np.float32)})
    proto = onnx.load(path)
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", "256")):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_elements_of_a_long_constant_are_gathered(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(100, 8, generator=generator)
    places = torch.randint(100, (8, 8), generator=generator)
    x = torch.randn(2, 5, 8, generator=generator)
    nodes = [
        ("GatherElements", ("numbers", "places"), "weight", {"axis": 0}),
        ("MatMul", ("x", "weight"), "y"),
    ]
    constants = {"numbers": numbers.numpy(), "places": places.numpy()}
    found = evaluate(convert.load(save(tmp_path / "m.onnx", nodes, constants)), x)
    assert torch.allclose(found, x @ numbers.gather(0, places), atol=1e-6)
    constants["places"][0, 0] = 100
    refused(save(tmp_path / "n.onnx", nodes, constants), "can't be computed: index 100")


def test_external_data_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin", 64)
    refused(path, f"external data is missing: {tmp_path}/weights.bin")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 319)
    refused(path, "is too short for 'w'")
    stored = np.arange(64, dtype=np.float32)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64 + stored.tobytes())
    array = onnx_file.read(path).constants["w"].data
    assert isinstance(array.base.base, np.memmap) or isinstance(array.base, np.memmap)
    np.testing.assert_array_equal(array, stored.reshape(8, 8))
    # The weight of the graph is still that file: transposed, not copied.
    weight = convert.load(path).output.weight  # type: ignore[attr-defined]
    assert np.shares_memory(weight.array.data, weight.array.data.base)
    np.testing.assert_array_equal(weight.block(0, 8), stored.reshape(8, 8).T)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 256)
    (tmp_path / "inner").mkdir()
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), ""):
        path = external(tmp_path / "inner" / "m.onnx", location)
        refused(path, "external data of 'w' lies outside the folder")
