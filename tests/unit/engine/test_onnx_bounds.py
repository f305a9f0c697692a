"""ONNX files that ask for too much, or lie: each ends in one line, within bounds of time and
memory; and constants of every type, inline and beside the file."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from memladder.core.errors import GraphError
from memladder.engine.compile.compile import CompileOptions, compile_file
from memladder.engine.frontend import convert, fold, onnx_file, rules
from memladder.engine.graph.evaluate import evaluate, evaluate_from
from tests.unit.onnx_models import save

MATRIX = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
TYPES = [
    name
    for name, number in TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING") and not name.startswith("COMPLEX")
]


def refused(path: Path, said: str) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        convert.load(path)
    assert "\n" not in str(caught.value)
    # Said where it is known to go wrong, and not by the outer boundary.
    assert caught.value.__cause__ is None


def stored(path: Path, kind: str, numbers: Any, *, external: bool, **entries: str) -> Path:
    """A model with a constant `c` of that type, and a `MatMul`."""
    save(path, [("MatMul", ("x", "w"), "y")], {"w": MATRIX})
    proto = onnx.load(path)
    tensor = numpy_helper.from_array(numbers, "c")
    assert TensorProto.DataType.Name(tensor.data_type) == kind
    if external:
        raw = tensor.raw_data
        (path.parent / "c.bin").write_bytes(b"\xff" * 3 + raw + b"\xff")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        found = {"location": "c.bin", "offset": "3", "length": str(len(raw)), **entries}
        for key, value in found.items():
            tensor.external_data.add(key=key, value=value)
    proto.graph.initializer.append(tensor)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_constants_of_every_type(kind: str, external: bool, tmp_path: Path) -> None:
    """An odd number of elements, so that those of less than a byte end within one."""
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    signed = kind not in ("BOOL", "FLOAT8E8M0") and not kind.startswith("UINT")
    small = np.array([0, 1, 1, 0, 1, -1 if signed else 1, 1, 0, 1, 1, 0, 1, 1, 0, 1])
    numbers = small.astype(np.float32).astype(dtype).reshape(3, 5)
    path = stored(tmp_path / "m.onnx", kind, numbers, external=external)
    found = onnx_file.read(path).constants["c"].data
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), numbers.astype(np.float32))


def test_int4_weights_beside_the_file(tmp_path: Path) -> None:
    """64 × 64 codes of half a byte, the first in the low half, and their scales by 32 rows."""
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
    scales = np.linspace(0.01, 0.02, 128, dtype=np.float32).reshape(2, 64)
    nodes = [
        ("DequantizeLinear", ("q", "s"), "w", {"axis": 0, "block_size": 32}),
        ("MatMul", ("x", "w"), "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"s": scales}, shape=(1, 3, 64))
    proto = onnx.load(path)
    low, high = codes.reshape(-1, 2).T.astype(np.uint8) & 15
    (tmp_path / "w.bin").write_bytes((low | high << 4).tobytes())
    tensor = TensorProto(name="q", data_type=TensorProto.INT4, dims=codes.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "2048")):
        tensor.external_data.add(key=key, value=value)
    proto.graph.initializer.append(tensor)
    path.write_bytes(proto.SerializeToString())
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    weight = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), 32, axis=0)
    expected = x.double().numpy() @ weight
    np.testing.assert_allclose(evaluate(convert.load(path), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "abc"}, "'c' has offset 'abc'; a number of bytes wanted"),
        ({"offset": "-1"}, "'c' has offset '-1'"),
        ({"offset": "9" * 30}, "'c' has offset '9999"),
        ({"offset": "5"}, "c.bin is too short for 'c'"),
        ({"length": "59"}, "'c' has length 59; 60 wanted"),
        ({"length": ""}, "'c' has length ''"),
        ({"location": "c.bin\0x"}, r"is in a file 'c\.bin\\x00x'"),
        ({"location": "x" * 5000}, "File name too long"),
        ({"location": "pipe"}, "pipe: not a file, but a pipe"),
        ({"location": "folder"}, "folder: not a file, but a folder"),
        ({"location": "loop"}, "external data of 'c'|loop"),
    ],
)
def test_references_that_are_none(entries: dict[str, str], said: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    numbers = np.zeros((3, 5), np.float32)
    refused(stored(tmp_path / "m.onnx", "FLOAT", numbers, external=True, **entries), said)


def damaged(path: Path, **fields: Any) -> Path:
    """The constant `c` with other fields."""
    stored(path, "INT4", np.zeros((3, 5), helper.tensor_dtype_to_np_dtype(22)), external=False)
    proto = onnx.load(path)
    for name, value in fields.items():
        tensor = proto.graph.initializer[1]
        tensor.ClearField(name)
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_constants_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    refused(damaged(path, dims=[3, -5]), r"'c' has the shape \[3, -5\]")
    refused(damaged(path, dims=[3, 9]), "'c' has 8 bytes; 14 wanted")
    refused(damaged(path, dims=[1 << 62, 1 << 62]), "'c' has 8 bytes")
    refused(damaged(path, data_type=8), "'c' is string, which is not supported")
    refused(damaged(path, data_type=77), "'c' is of type 77")
    refused(damaged(path, name="w"), "two constants of one name")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a file, but a pipe")
    refused(Path("/dev/zero"), "not a file, but a device")
    refused(tmp_path / ("x" * 300), "File name too long")
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(1 << 32)
    refused(tmp_path / "huge.onnx", "4,294,967,296 bytes; 2,147,483,647 are the most")
    # The content decides, and not the name.
    for name in ("m.onnxtxt", "m.json", "m.textproto"):
        path = save(tmp_path / "m.onnx", [("MatMul", ("x", "w"), "y")], {"w": MATRIX})
        path = path.rename(tmp_path / name)
        assert convert.load(path).output.columns == 8


SIZE = np.array(1 << 28)
GREEDY = {
    "Range": [("Range", ("zero", "size", "one"), "c")],
    "ConstantOfShape": [("ConstantOfShape", "sizes", "c")],
    "Expand": [("Expand", ("ones", "sizes"), "c")],
    "Tile": [("Tile", ("ones", "sizes"), "c")],
    "Pad": [("Pad", ("ones", "pads"), "c")],
    "Resize": [("Resize", ("ones", "", "", "sizes"), "c")],
    "OneHot": [("OneHot", ("many", "size", "pair"), "c")],
    "EyeLike": [
        ("Equal", ("column", "row"), "b"),
        ("EyeLike", "b", "c", {"dtype": TensorProto.DOUBLE}),
    ],
    "outer": [("Mul", ("column", "row"), "c")],
    "Gather": [("Gather", ("row", "twice"), "c")],
    "HannWindow": [("HannWindow", "size", "c")],
    "Einsum": [("Einsum", ("column", "row"), "c", {"equation": "ij,kl->il"})],
}


@pytest.mark.parametrize("name", GREEDY)
def test_constants_are_computed_within_bounds(name: str, tmp_path: Path) -> None:
    nodes = GREEDY[name]
    known = {
        "zero": np.array(0),
        "one": np.array(1),
        "size": SIZE,
        "sizes": np.array([1 << 14, 1 << 14]),
        "pads": np.array([1 << 14] * 4),
        "ones": np.ones((1, 1), np.float32),
        "many": np.arange(1000),
        "pair": np.array([0, 1]),
        "row": np.ones((1, 1 << 14), np.float32),
        "column": np.ones((1 << 14, 1), np.float32),
        "twice": np.zeros((1 << 14,), np.int64),
    }
    read = {x for node in nodes for x in ((node[1],) if isinstance(node[1], str) else node[1])}
    nodes = [*nodes, ("Cast", "c", "f", {"to": 1}), ("ReduceSum", "f", "s", {"keepdims": 0}),
             ("Add", ("x", "s"), "y")]  # fmt: skip
    constants = {key: value for key, value in known.items() if key in read}
    path = save(tmp_path / "m.onnx", nodes, constants)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "are the most|it computes on a weight")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # KiB: the bound of all constants that are held, and an operator's own temporaries.
    assert grown <= 2 << 20


def test_constants_that_are_held_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "_MOST_HELD_BYTES", 1 << 20)
    kilobytes = {"size": np.array([1 << 17])}
    nodes: list[Any] = [("ConstantOfShape", "size", f"c{i}") for i in range(3)]
    joined = [("Concat", ("c0", "c1", "c2"), "c", {"axis": 0}), ("ReduceSum", "c", "s"),
              ("Reshape", ("s", "one"), "o"), ("Add", ("x", "o"), "y")]  # fmt: skip
    known = {**kilobytes, "one": np.array([1])}
    refused(save(tmp_path / "m.onnx", nodes + joined, known), "1,572,864 bytes of constants are")
    # One at a time each goes with its last reader.
    nodes = []
    for i in range(9):
        nodes += [("ConstantOfShape", "size", f"c{i}"), ("ReduceSum", f"c{i}", f"s{i}"),
                  ("Reshape", (f"s{i}", "one"), f"o{i}"),
                  ("Add", (f"y{i}" if i else "x", f"o{i}"), f"y{i + 1}")]  # fmt: skip
    assert convert.load(save(tmp_path / "n.onnx", nodes, known, output="y9")).output.columns == 8


def test_random_constants_are_refused(tmp_path: Path) -> None:
    nodes = [("RandomNormal", [], "r", {"shape": [8]}), ("Add", ("x", "r"), "y")]
    refused(save(tmp_path / "m.onnx", nodes), "unsupported operator RandomNormal .* it is random")


def chain(path: Path, length: int, spelled: Any) -> Path:
    nodes = [("MatMul", ("x", "w"), "z0")]
    for number in range(length):
        nodes += spelled(f"z{number}", f"t{number}", f"z{number + 1}")
    constants = {"w": MATRIX, "turn": np.roll(np.arange(8), 1), "half": np.float32(0.5)}
    read = {x for node in nodes for x in ((node[1],) if isinstance(node[1], str) else node[1])}
    constants = {key: value for key, value in constants.items() if key in read}
    return save(path, nodes, constants, output=f"z{length}")


CHAINS = {
    "tanh": lambda z, t, y: [("Tanh", z, y)],
    "mixed": lambda z, t, y: [("Tanh", z, t), ("Sigmoid", t, y)],
    "residual": lambda z, t, y: [("Tanh", z, t), ("Add", (z, t), y)],
    "twice": lambda z, t, y: [("Add", (z, z), t), ("Mul", (t, "half"), y)],
    "turned": lambda z, t, y: [("Gather", (z, "turn"), t, {"axis": 2}), ("Max", (t, "half"), y)],
    "sums": lambda z, t, y: [("Gather", (z, "turn"), t, {"axis": 2}), ("Add", (z, t), y)],
    "products": lambda z, t, y: [("MatMul", (z, "w"), y)],
    "input": lambda z, t, y: [("Add", (z, "x"), y)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_take_linear_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def counted(node: Any, leaf: Any, values: Any) -> Any:
        counts.append(1)
        return evaluate_from(node, leaf, values)

    monkeypatch.setattr(rules, "evaluate_from", counted)
    taken = []
    for length in (30, 60):
        counts.clear()
        compile_file(chain(tmp_path / "m.onnx", length, CHAINS[name]), CompileOptions("welder"))
        taken.append(len(counts))
    # Of the first operators fewer ways back are looked at.
    assert taken[1] <= 3 * taken[0] + 10


@pytest.mark.parametrize("name", ["input", "products", "twice", "tanh"])
def test_a_thousand_operators(name: str, tmp_path: Path) -> None:
    """Deeper than Python's stack."""
    length = 150 if name == "tanh" else 1000
    path = chain(tmp_path / "m.onnx", length, CHAINS[name])
    assert len(compile_file(path, CompileOptions("welder")).program.steps) <= length + 1


def test_a_chain_is_what_it_says(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 150, CHAINS["mixed"])
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = x @ torch.from_numpy(MATRIX)
    for _ in range(150):
        expected = expected.tanh().sigmoid()
    assert torch.allclose(evaluate(convert.load(path), x), expected, atol=1e-6)
