"""Packed files: what was packed comes back; any other file is a FormatError, one line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memladder import formats, models
from memladder.core.case import Workload
from memladder.core.errors import FormatError
from memladder.engine.compile import layers
from memladder.engine.compile.layers import CompiledLayer
from memladder.engine.packed import packed_layer, packing
from memladder.engine.packed.packed_layer import Form
from memladder.engine.program.plan import plan

CONFIG = models.LayerConfig(
    "bloom",
    models.definition("bloom").read({"model_type": "bloom", "hidden_size": 192, "n_head": 6}),
)


# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def compiled(cache_dir: Path) -> CompiledLayer:
    return layers.ensure(CONFIG, cache_dir)


def pack(path: Path, compiled: CompiledLayer) -> dict[str, Tensor]:
    """A packed file; returns the weights that are in it."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator).half()
        for name, shape in models.tensor_shapes(CONFIG).items()
    }
    kind = formats.get("int4:zero_point=true")
    packing.pack(compiled, kind, lambda n, start, stop: weights[n][start:stop], path)
    return weights


@pytest.fixture
def path(tmp_path: Path, compiled: CompiledLayer) -> Path:
    pack(tmp_path / "layer.safetensors", compiled)
    return tmp_path / "layer.safetensors"


def rewrite(path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> None:
    """The file again with other metadata and tensors; None leaves a tensor out."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = file.metadata() | (metadata or {})
    found |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kept = {name: tensor for name, tensor in found.items() if tensors.get(name, tensor) is not None}
    save_file(kept, path, about)


def refused(path: Path) -> str:
    """What `load` says of the file: one line that names it."""
    with pytest.raises(FormatError) as caught:
        packed_layer.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(path)) + 400
    return text


def test_a_packed_layer_comes_back(path: Path, compiled: CompiledLayer) -> None:
    weights = pack(path, compiled)
    layer = packed_layer.load(path)
    assert str(layer.form.format) == "int4:zero_point=true"
    assert layer.form.others == {}
    assert layer.form.shape is None
    assert plan(layer.form.program(Workload(1, 9))) == plan(
        Form(compiled.fused, layer.form.format, {}).program(Workload(1, 9))
    )
    assert set(layer.matrices) == {"query", "key", "value", "output", "up", "down"}
    # [heads, query key value, rows of a head]: 6 heads of 32 rows.
    fused = weights["self_attention.query_key_value.bias"].view(6, 3, 32)
    for part, name in enumerate(("query", "key", "value")):
        assert torch.equal(layer.vectors[f"{name}.bias"], fused[:, part].reshape(-1))
    down = weights["mlp.dense_4h_to_h.weight"].float()
    step = layer.matrices["down"].scales.t().float().repeat_interleave(128, dim=1)
    assert ((layer.matrices["down"].dequantise() - down).abs() <= step * 0.51).all()
    assert layer.nbytes == layer.form.nbytes
    assert path.stat().st_size == layer.nbytes + _data_start(path)


def test_a_rewritten_file_is_still_good(path: Path) -> None:
    before = packed_layer.load(path).form.program(Workload(2, 3))
    rewrite(path)
    assert packed_layer.load(path).form.program(Workload(2, 3)) == before


DAMAGED_METADATA = [
    ({"memladder_packed": "0"}, "packed by recipe '0'; this version reads 3"),
    ({"memladder_packed": "2\n" * 90}, "packed by recipe '2"),
    ({"format": "int3"}, "unknown format 'int3'"),
    ({"format": "int4:group_size=100"}, "group_size 100"),
    ({"format": "int4:depth=1"}, "no parameter 'depth'"),
    ({"format": "a\nb" * 90}, "unknown format"),
    ({"formats": "{"}, "metadata is damaged"),
    ({"formats": "[1]"}, "metadata is damaged"),
    ({"formats": '{"gate": "fp16"}'}, "a format of a matrix that is not there"),
    ({"formats": '{"up": "fp99"}'}, "unknown format 'fp99'"),
    ({"shape": "1"}, "shape '1' is not of the form"),
    ({"layer": "{"}, "metadata is damaged"),
    ({"layer": "[" * 100_000}, "metadata is damaged"),
    ({"layer": "null"}, "metadata is damaged"),
    ({"layer": "{}"}, "metadata is damaged"),
    ({"author": "somebody"}, "not a layer packed by memladder"),
]


@pytest.mark.parametrize(("metadata", "said"), DAMAGED_METADATA)
def test_damaged_metadata(path: Path, metadata: dict[str, str], said: str) -> None:
    rewrite(path, metadata)
    assert said in refused(path)


def damage(node: str, /, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Other values in the first node of a kind."""
    return lambda raw: next(n for n in raw["nodes"] if n["node"] == node).update(values)


DAMAGED_LAYERS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (damage("product", node="eval"), "no fused layer: 'eval'"),
    (damage("product", activation="__loader__"), "no kernel for"),
    (damage("namednorm", kind="max"), "no kernel for"),
    (damage("product", x=99), "no fused layer"),
    (lambda raw: raw["nodes"][-1].update(weight="gate"), "no fused layer"),
    (damage("product", columns="7"), "'7' is not int"),
    (damage("namednorm", name="other"), "it reads what it has not"),
    (lambda raw: raw.update(output=3), "no fused layer"),
    (lambda raw: raw.update(attention=0), "attention that is none"),
    (lambda raw: raw.update(projected=[0, 1, 2]), "projections that are none"),
    (lambda raw: raw["nodes"].append(raw["nodes"][0]), "too many values"),
    (lambda raw: raw["vectors"].update(more=[1]), "is not int"),
    (lambda raw: raw["matrices"].update(key=[192, 384]), "is torch."),
    (lambda raw: raw["constants"].update({"alibi.slopes": 7}), "is torch."),
]


@pytest.mark.parametrize(("damaged", "said"), DAMAGED_LAYERS)
def test_damaged_layers(path: Path, damaged: Callable[[dict[str, Any]], object], said: str) -> None:
    with safe_open(path, framework="pt") as file:
        raw = json.loads(file.metadata()["layer"])
    damaged(raw)
    rewrite(path, {"layer": json.dumps(raw)})
    assert said in refused(path)


def test_another_format_does_not_fit_the_tensors(path: Path) -> None:
    rewrite(path, {"format": "int4"})
    assert "zeros' is unknown" in refused(path)


def test_foreign_files(tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(4)}, foreign)
    assert "not a layer packed by memladder" in refused(foreign)
    save_file({"weight": torch.zeros(4)}, foreign, {"format": "pt"})
    assert "not a layer packed by memladder" in refused(foreign)


def test_missing_and_extra_tensors(path: Path) -> None:
    rewrite(path, **{"key.scales": None})
    assert "tensor 'key.scales' is missing" in refused(path)
    rewrite(path, **{"key.scales": torch.zeros(2, 192).half(), "a\nb" * 99: torch.zeros(1)})
    assert r"tensor 'a\nba\nb" in refused(path)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("key.scales", torch.zeros(2, 192), "torch.float32 [2, 192], not torch.float16 [2, 192]"),
        ("key.scales", torch.zeros(192, 2).half(), "torch.float16 [192, 2], not"),
        ("key.codes", torch.zeros(4, dtype=torch.uint8), "torch.uint8 [4], not torch.uint8 [3, 2"),
        ("alibi.slopes", torch.zeros(6).half(), "torch.float16 [6], not torch.float32 [6]"),
        ("output.bias", torch.zeros(()).half(), "torch.float16 [], not torch.float16 [192]"),
    ],
)
def test_wrong_dtypes_and_shapes(path: Path, name: str, tensor: Tensor, said: str) -> None:
    rewrite(path, **{name: tensor})
    assert f"tensor {name} is {said}" in refused(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 4095, 4096, 5000, -1])
def test_truncated_files(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a readable safetensors file" in refused(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.safetensors")
    assert "not a file" in refused(tmp_path)
    assert "not a readable safetensors file" in refused(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused(tmp_path / "pipe")
    text = tmp_path / "text"
    text.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "not a readable safetensors file" in refused(text)


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}},
        {"a": {"dtype": "X\nY", "shape": [4], "data_offsets": [0, 3]}},
        {"a": {"dtype": "F16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 3]}},
        {"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 3]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [3, 0]}},
        {"__metadata__": {"memladder_packed": 1}},
        [],
        7,
    ],
)
def test_senseless_headers(tmp_path: Path, table: Any) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    refused(path)


def test_any_flipped_byte_of_the_header_is_harmless(path: Path) -> None:
    whole = path.read_bytes()
    used = len(whole[: _data_start(path)].rstrip())
    generator = random.Random(0)
    texts = []
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(used)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            packed_layer.load(path)
        except FormatError as error:
            texts.append(str(error))
    assert len(texts) > 300
    assert not [text for text in texts if len(text.splitlines()) != 1]


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# The largest magnitude of which a group, or a row, has no scale: half of float16's smallest number
# (2^-25) times the largest code, or of float32's (2^-150) or E8M0's (2^-127) scale.
LEAST = {
    "fp16": 2.0**-25,
    "int4": 7.5 * 2.0**-25,
    "int4:zero_point=true": 15 / 2 * 2.0**-25,
    "nf4": 2.0**-25,
    "int2": 2.0**-25,
    "int1": 2.0**-25,
    "fp8:scale=float16": 448 * 2.0**-25,
    "fp8": 448 * 2.0**-150,
    "int8": 127 * 2.0**-150,
}


@pytest.mark.parametrize("spec", LEAST)
def test_scales_that_vanish_are_refused(spec: str) -> None:
    """A group of one magnitude, of both signs; the others' are fine, and so are zeros."""
    kind = formats.get(spec)
    values = torch.ones(3, 256)
    values[:, ::2] = -1
    values[1, :128] = 0
    packing._quantised(kind, values, "w")
    small = values.clone()
    small[2] *= LEAST[spec] * 0.98
    with pytest.raises(FormatError, match=r"^w: .* has no (scale|value) that small: of \d+ group"):
        packing._quantised(kind, small, "w")
    packing._quantised(kind, small * 8, "w")
    packing._quantised(kind, torch.zeros(3, 256), "w")


@pytest.mark.parametrize("spec", ["mxfp8", "mxfp4"])
def test_blocks_below_the_least_power_of_two_are_refused(spec: str) -> None:
    kind = formats.get(spec)
    values = torch.ones(2, 64)
    values[1, 32:] = 2.0**-127 * 0.9
    with pytest.raises(FormatError, match=r"of 1 groups the largest weight is 5.3e-39"):
        packing._quantised(kind, values, "w")
    values[1, 32:] = 2.0**-118
    packing._quantised(kind, values, "w")
