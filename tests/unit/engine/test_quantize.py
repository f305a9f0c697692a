"""`memladder quantize`: what it writes and says of tiny checkpoints, and every way it can't."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memladder import formats, models
from memladder.cli.commands import quantize
from memladder.core.errors import MemladderError, UsageError
from memladder.engine.compile import layers
from memladder.engine.packed import checkpoint, packed_layer, packing
from memladder.formats.int8 import Int8
from memladder.models import cache
from tests.unit.command import Command, Done

ROOT = Path(__file__).parents[3]
# Shapes that fill neither groups nor tiles: 192 and 200 columns, 96 and 200 rows.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 12,
}
BLOOM = {"model_type": "bloom", "n_embed": 192, "n_head": 6, "n_layer": 3}
LLAMA_SOURCES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
BLOOM_SOURCES = {
    "output": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
QKV = "self_attention.query_key_value"

Weights = dict[str, Tensor]

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def compiled(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers are there already: to compile one takes a process of its own, and seconds."""
    monkeypatch.setenv("MEMLADDER_CACHE", str(cache_dir))
    for raw in (LLAMA, BLOOM):
        model = raw["model_type"]
        layers.ensure(models.LayerConfig(model, models.definition(model).read(raw)), cache_dir)


def weights(config: dict[str, Any], prefix: str, dtype: torch.dtype, seed: int = 0) -> Weights:
    """A layer's tensors with their names in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    model = config["model_type"]
    layer = models.LayerConfig(model, models.definition(model).read(config))
    shapes = models.tensor_shapes(layer)
    return {
        prefix + name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in shapes.items()
    }


def write(
    folder: Path, config: dict[str, Any], tensors: Weights, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / name, {"format": "pt"})
    return folder


def write_shards(folder: Path, config: dict[str, Any], tensors: Weights) -> Path:
    """Two shards, the layer's tensors in turn, and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for shard in (1, 2):
        file = f"model-0000{shard}-of-00002.safetensors"
        part = dict(list(tensors.items())[shard - 1 :: 2])
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    write_index(folder, places)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def expected(model: str, tensors: Weights, prefix: str) -> dict[str, np.ndarray]:
    """The engine's matrices in float64, by a reading of the published layouts of its own."""
    if model == "llama":
        return {
            name: tensors[f"{prefix}{source}.weight"].double().numpy()
            for name, source in LLAMA_SOURCES.items()
        }
    # BLOOM: rows are heads, then query, key and value, then a head's rows.
    fused = tensors[f"{prefix}{QKV}.weight"].double().numpy().reshape(6, 3, 32, 192)
    found = {
        name: fused[:, part].reshape(192, 192)
        for part, name in enumerate(("query", "key", "value"))
    }
    for name, source in BLOOM_SOURCES.items():
        found[name] = tensors[f"{prefix}{source}.weight"].double().numpy()
    return found


def int4_bytes(rows: int, columns: int) -> int:
    """Tiles of 64 × 128 codes of half a byte, and a scale of two bytes for 128 columns."""
    groups = -(-columns // 128)
    return -(-rows // 64) * 64 * groups * 128 // 2 + rows * groups * 2


CHECKPOINTS = {
    "llama, sharded": (LLAMA, "model.layers.{}.", torch.float16, write_shards),
    "llama, one file, bf16": (LLAMA, "model.layers.{}.", torch.bfloat16, write),
    "llama, bare, fp32": (LLAMA, "layers.{}.", torch.float32, write),
    "bloom-560m": (BLOOM, "h.{}.", torch.float16, write),
    "bloom": (BLOOM, "transformer.h.{}.", torch.float16, write_shards),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_layer_is_packed_and_judged(memladder: Command, tmp_path: Path, name: str) -> None:
    config, prefix, dtype, write_checkpoint = CHECKPOINTS[name]
    model = config["model_type"]
    tensors = {"other.weight": torch.zeros(3)}
    for layer in (1, 10):
        tensors |= weights(config, prefix.format(layer), dtype, seed=layer)
    folder = write_checkpoint(tmp_path / "checkpoint", config, tensors)
    done = memladder("quantize", folder, "--layer", "1", "--out", "out")
    assert (done.code, done.err) == (0, "")
    path = tmp_path / f"out/{model}-layer1-int4.safetensors"
    summary = path.with_suffix(".json")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        *(summary.name, path.name, f"{path.name}.sha256")
    ]

    packed = packed_layer.load(path)
    found = json.loads(summary.read_text())
    matrices = expected(model, tensors, prefix.format(1))
    signal = noise = 0.0
    table = done.out.splitlines()
    assert [row["name"] for row in found["matrices"]] == list(matrices)
    for row in found["matrices"]:
        matrix = matrices[row["name"]]
        rows, columns = matrix.shape
        assert (row["rows"], row["columns"]) == (rows, columns)
        assert row["bytes"] == int4_bytes(rows, columns)
        assert row["bits_per_weight"] == 8 * row["bytes"] / matrix.size
        lost = packed.matrices[row["name"]].dequantise().double().numpy() - matrix
        sqnr = 10 * np.log10((matrix**2).sum() / (lost**2).sum())
        assert row["sqnr_db"] == pytest.approx(sqnr, abs=1e-5)
        # Two groups of 128 and 64 or 72 normal numbers: absmax near 2.7, steps of absmax / 7.5.
        assert 18 < sqnr < 22
        signal, noise = signal + (matrix**2).sum(), noise + (lost**2).sum()
        (line,) = [line for line in table if line.split("│")[1:2] == [f" {row['name']:<7} "]]
        for text in (f"{rows} × {columns}", f"{row['bytes'] / 2**20:.3f}", f"{sqnr:.2f}"):
            assert f" {text} " in line
    assert found["total"]["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=1e-5)
    assert found["parameters"] == sum(
        tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix.format(1))
    )
    assert found["total"]["bytes"] == packed.nbytes
    assert found["total"]["bits_per_weight"] == 8 * packed.nbytes / found["parameters"]
    bare = {"llama": (2 * 192) * 2 + 24 * 4, "bloom": (4 + 3 + 1 + 4 + 1) * 192 * 2 + 6 * 4}[model]
    assert found["vectors"]["bytes"] == bare
    assert packed.nbytes == bare + sum(row["bytes"] for row in found["matrices"])
    assert found["file_bytes"] == path.stat().st_size
    assert 0 < path.stat().st_size - packed.nbytes <= 8192
    assert done.out.endswith(f"out/{model}-layer1-int4.safetensors\nout/{model}-layer1-int4.json\n")

    again = tmp_path / "again.safetensors"
    loose = {n.removeprefix(prefix.format(1)): tensor for n, tensor in tensors.items()}
    compiled = layers.ensure(
        models.layer_config(model, folder / "config.json"), cache.default_dir()
    )
    packing.pack(compiled, formats.get("int4"), lambda n, start, stop: loose[n][start:stop], again)
    assert again.read_bytes() == path.read_bytes()


def test_fp16_of_an_fp16_checkpoint_is_exact(memladder: Command, bloom: Path) -> None:
    done = memladder("quantize", bloom, "--format", "fp16", "--out", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.count(" exact ") == 7
    found = json.loads(Path("out/bloom-layer0-fp16.json").read_text())
    assert found["total"]["sqnr_db"] is None
    # 442,368 weights of six matrices and as many biases and norms as before.
    assert found["total"]["bytes"] == 12 * 192**2 * 2 + 13 * 192 * 2 + 6 * 4
    vectors = packed_layer.load(Path("out/bloom-layer0-fp16.safetensors")).vectors
    tensors = weights(BLOOM, "h.0.", torch.float16)
    assert torch.equal(vectors["up.bias"], tensors["h.0.mlp.dense_h_to_4h.bias"])


def test_its_table_is_printed_on_an_ascii_terminal(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert memladder("quantize", bloom, "--format", "int4", "--out", "out").code == 0
    terminal.flush()
    assert b"192 x 192" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["nf4", "mxfp4", "int8", "fp8:element=e5m2", "int4:group_size=64"])
def test_other_formats_and_parameters(memladder: Command, bloom: Path, text: str) -> None:
    done = memladder("quantize", bloom, "--format", text, "--out", "out")
    assert (done.code, done.err) == (0, "")
    path = Path(f"out/bloom-layer0-{text.partition(':')[0]}.safetensors")
    assert str(packed_layer.load(path).form.format) == text
    assert json.loads(path.with_suffix(".json").read_text())["format"] == text


def test_a_single_file_of_any_name(memladder: Command, tmp_path: Path) -> None:
    tensors = weights(BLOOM, "h.0.", torch.float16)
    folder = write(tmp_path / "c", BLOOM, tensors, "weights.fp16.safetensors")
    assert memladder("quantize", folder, "--out", "out").code == 0


def test_a_checkpoint_may_be_made_of_links(memladder: Command, tmp_path: Path, bloom: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in bloom.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert memladder("quantize", "snapshot", "--out", "out").code == 0


def test_buffers_of_old_checkpoints_do_not_disturb(memladder: Command, tmp_path: Path) -> None:
    prefix = "model.layers.0."
    tensors = weights(LLAMA, prefix, torch.float16)
    tensors[f"{prefix}self_attn.rotary_emb.inv_freq"] = torch.ones(24)
    assert memladder("quantize", write(tmp_path / "c", LLAMA, tensors), "--out", "out").code == 0


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    return write(tmp_path / "bloom", BLOOM, weights(BLOOM, "h.0.", torch.float16))


# What is done to a good checkpoint of one BLOOM layer, and what must be said of it.
Damage = Callable[[Path], object]


def reconfigure(**values: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**BLOOM, **values}))


def retensor(**tensors: Tensor | None) -> Damage:
    def damage(folder: Path) -> None:
        found = weights(BLOOM, "h.0.", torch.float16)
        for name, tensor in tensors.items():
            found.pop("h.0." + name, None)
            if tensor is not None:
                found["h.0." + name] = tensor
        save_file(found, folder / "model.safetensors")

    return damage


def reindex(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        names = weights(BLOOM, "h.0.", torch.float16)
        named = dict.fromkeys(names, weight_map) if isinstance(weight_map, str) else weight_map
        write_index(folder, named)

    return damage


def replace(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def rename(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def copy(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").unlink()


def with_value(value: float, dtype: torch.dtype, row: int) -> Tensor:
    tensor = torch.zeros(768, 192, dtype=dtype)
    tensor[row, 5] = value
    return tensor


DOWN = "mlp.dense_4h_to_h.weight"
UP = "mlp.dense_h_to_4h.weight"
NORM = "input_layernorm.weight"
SAFETENSORS = "model.safetensors"

BAD_CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "no config": (rename("config.json", "c.json"), "bloom: no config.json"),
    "config no JSON": (replace("config.json", b"{"), "config.json: not JSON"),
    "config not UTF-8": (replace("config.json", b'{"a": "\xff"}'), "config.json: not JSON"),
    "config deep": (replace("config.json", b"[" * 100_000), "config.json: not JSON"),
    "config a list": (replace("config.json", b"[]"), "config.json: not a JSON object"),
    "other model": (reconfigure(model_type="mistral"), "'mistral' is not one of bloom, llama"),
    "no model": (reconfigure(model_type=None), "model_type 'None' is not one of bloom, llama"),
    "model no name": (reconfigure(model_type=["bloom"]), "is not one of bloom, llama"),
    "no layers": (reconfigure(n_layer=None), "config.json: num_hidden_layers is missing"),
    "bad layers": (reconfigure(n_layer=-3), "num_hidden_layers '-3' is not a whole number"),
    "bad heads": (reconfigure(n_head=5), "hidden_size 192 is not a multiple of n_head 5"),
    "pickles": (rename(SAFETENSORS, "pytorch_model.bin"), "only pickled weights (pytorch_model"),
    "no weights": (rename(SAFETENSORS, "model.h5"), "no safetensors file there"),
    "several": (copy, "2 safetensors files, and no model.safetensors.index.json"),
    "truncated": (truncate, "model.safetensors: not a readable safetensors file"),
    "empty": (replace(SAFETENSORS, b""), "model.safetensors: not a readable safetensors file"),
    "text": (replace(SAFETENSORS, b"version https://git-lfs"), "not a readable safetensors file"),
    "index no JSON": (
        lambda folder: (reindex({})(folder), replace(f"{SAFETENSORS}.index.json", b"x")(folder)),
        "model.safetensors.index.json: not JSON",
    ),
    "index no map": (reindex([]), "index.json: no weight_map"),
    "index of numbers": (reindex({"h.0.a": 1}), "index.json: no weight_map"),
    "index empty": (reindex({}), "no tensor of layer 0: none begins with transformer.h.0. or h.0."),
    "index names nothing": (reindex("b.safetensors"), "b.safetensors: no such file"),
    "index names the folder": (reindex(""), "not a file"),
    "index leads out": (reindex("../bloom/a.safetensors"), "'../bloom/a.safetensors' is not with"),
    "index absolute": (reindex("/etc/passwd"), "'/etc/passwd' is not within the folder"),
    "index odd": (reindex("a\n\0b"), r"'a\n\x00b' is not within the folder"),
    "index long": (reindex("x" * 300), "File name too long"),
    "index lies": (
        lambda folder: (retensor(**{DOWN: None})(folder), reindex("a.safetensors")(folder)),
        f"a.safetensors: tensor h.0.{DOWN} is missing",
    ),
    "missing tensor": (retensor(**{DOWN: None}), f"tensor h.0.{DOWN} is missing"),
    "missing norm": (retensor(**{NORM: None}), f"tensor h.0.{NORM} is missing"),
    "extra tensor": (
        retensor(**{"mlp.gate.weight": torch.zeros(1)}),
        "config.json knows nothing of tensor 'h.0.mlp.gate.weight'",
    ),
    "adapter": (
        retensor(**{UP.removesuffix("weight") + "lora_A": torch.zeros(8, 192)}),
        "knows nothing of tensor 'h.0.mlp.dense_h_to_4h.lora_A', which belongs to layer 0",
    ),
    "scale": (retensor(**{f"{UP}_scale": torch.ones(1)}), f"knows nothing of tensor 'h.0.{UP}_sca"),
    "quantised already": (
        reconfigure(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config says that the weights are quantised already, by 'gptq'; wanted: ",
    ),
    "scales that vanish": (
        retensor(**{UP: torch.randn(768, 192).mul_(1e-8).half()}),
        f"{UP}: int4 has no scale that small",
    ),
    "norm that vanishes": (
        retensor(**{NORM: torch.full((192,), 1e-9)}),
        f"{NORM}: fp16 has no value that small; all of it would be zero",
    ),
    "wrong shape": (
        retensor(**{DOWN: torch.zeros(768, 192).half()}),
        f"tensor h.0.{DOWN} is of shape [768, 192]; by config.json it is [192, 768]",
    ),
    "scalar": (retensor(**{NORM: torch.tensor(1.0)}), f"tensor h.0.{NORM} is of shape []"),
    "wrong dtype": (
        retensor(**{UP: torch.zeros(768, 192, dtype=torch.int8)}),
        f"tensor h.0.{UP} is I8; F16, BF16, F32 can be read",
    ),
    "float8": (
        retensor(**{UP: torch.zeros(768, 192, dtype=torch.float8_e4m3fn)}),
        f"tensor h.0.{UP} is F8_E4M3; F16",
    ),
    "double": (retensor(**{NORM: torch.zeros(192).double()}), f"tensor h.0.{NORM} is F64"),
    "NaN": (retensor(**{UP: with_value(np.nan, torch.float16, 7)}), f"{UP} holds NaN or infinity"),
    "infinity": (
        retensor(**{UP: with_value(-np.inf, torch.bfloat16, 767)}),
        f"{UP} holds NaN or infinity",
    ),
    "NaN in a norm": (
        retensor(**{NORM: torch.full((192,), np.nan).half()}),
        f"{NORM} holds NaN or infinity",
    ),
    "too large": (retensor(**{UP: with_value(1e30, torch.float32, 7)}), f"{UP}: a scale beyond 65"),
    "norm too large": (
        retensor(**{NORM: torch.full((192,), 1e6)}),
        f"{NORM}: a value beyond 65504",
    ),
}


def refused(done: Done, said: str) -> None:
    """One line on stderr, nothing on stdout, nothing left in the folder out."""
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.startswith("memladder: error: ")
    assert done.err.count("\n") == 1
    assert not Path("out").exists() or not list(Path("out").iterdir())


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_line(memladder: Command, bloom: Path, name: str) -> None:
    damage, said = BAD_CHECKPOINTS[name]
    damage(bloom)
    refused(memladder("quantize", "bloom", "--out", "out"), said)


BAD_ARGUMENTS = [
    (["none", "--out", "out"], "none: no such folder"),
    (["bigscience/bloom-560m", "--out", "out"], "bigscience/bloom-560m: no such folder"),
    (["bloom/config.json", "--out", "out"], "bloom/config.json: no such folder"),
    (["x" * 300, "--out", "out"], "File name too long"),
    (["bloom", "--out", "out", "--layer", "3"], "bloom has layers 0 … 2, not 3"),
    (["bloom", "--out", "out", "--layer", "1"], "no tensor of layer 1"),
    (["bloom", "--out", "out", "--layer", "-1"], "layer '-1' is not a whole number from 0 to"),
    (["bloom", "--out", "out", "--layer", "x"], "layer 'x' is not a whole number from 0 to"),
    (["bloom", "--out", "out", "--layer", "9" * 99], "layer '9999"),
    (["bloom", "--out", "out", "--format", "int3"], "unknown format 'int3'; known: fp16, fp8"),
    (["bloom", "--out", "out", "--format", "int4:size=1"], "int4 has no parameter 'size'"),
    (["bloom", "--out", "out", "--format", ""], "unknown format ''"),
    (["bloom", "--out", "file"], "cannot write into folder file"),
    (["bloom", "--out", "/dev/null/x"], "cannot write into folder /dev/null/x"),
    (["bloom"], "--out"),
    (["--out", "out"], "CHECKPOINT"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(
    memladder: Command, bloom: Path, arguments: list[str], said: str
) -> None:
    (bloom.parent / "file").write_text("no folder")
    refused(memladder("quantize", *arguments), said)
    assert (bloom.parent / "file").read_text() == "no folder"


BAD_POSITIONS: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "yarn", "factor": 2.0}, "no rotary positions of type 'yarn'"),
    ({"rope_type": "llama3"}, "transformers can't build this llama: .Missing required"),
    ({"rope_type": "linear", "factor": "x"}, "transformers can't build this llama"),
    ({"rope_type": "linear", "factor": 0}, "numbers by position that are not finite"),
]


@pytest.mark.parametrize(("rope", "said"), BAD_POSITIONS)
def test_bad_positions_are_refused(tmp_path: Path, rope: dict[str, Any], said: str) -> None:
    raw = {**LLAMA, "rope_scaling": rope}
    config = models.LayerConfig("llama", models.definition("llama").read(raw))
    with pytest.raises(MemladderError, match=said) as caught:
        layers.ensure(config, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_bad_positions_are_one_line(tmp_path: Path) -> None:
    # A process of its own: transformers would add lines of its own.
    config = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": "x"}}
    write(tmp_path / "c", config, weights(LLAMA, "model.layers.0.", torch.float16))
    code = "from memladder.cli.main import main; main()"
    process = start(code, "quantize", tmp_path / "c", "--out", tmp_path / "out")
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, printed, said.count("\n")) == (2, "", 1)
    assert "transformers can't build this llama" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_formats_of_activations_alone_are_refused(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Int8, "is_weight", False)
    refused(
        memladder("quantize", "bloom", "--format", "int8", "--out", "out"),
        "int8 is for activations",
    )


def test_nothing_is_overwritten(memladder: Command, bloom: Path) -> None:
    assert memladder("quantize", "bloom", "--out", "out").code == 0
    for name in ("bloom-layer0-int4.safetensors", "bloom-layer0-int4.json"):
        content = {path: path.read_bytes() for path in Path("out").iterdir()}
        done = memladder("quantize", "bloom", "--out", "out")
        assert (done.code, done.out) == (2, "")
        assert f"out/{name} is there already" in done.err
        assert done.err.count("\n") == 1
        assert {path: path.read_bytes() for path in Path("out").iterdir()} == content
        (Path("out") / name).unlink()
    assert memladder("quantize", "bloom", "--out", "out").code == 0


def on_reading(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something when the third block is read: the file is half-written then."""
    real = checkpoint.CheckpointLayer.rows

    def rows(self: checkpoint.CheckpointLayer) -> packing.Rows:
        calls = 0

        def read(name: str, start: int, stop: int) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                assert [path.suffix for path in Path("out").iterdir()] == [".part"]
                action()
            return real(self)(name, start, stop)

        return read

    monkeypatch.setattr(checkpoint.CheckpointLayer, "rows", rows)


def test_another_process_that_was_quicker_is_not_overwritten(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("out/bloom-layer0-int4.safetensors")
    on_reading(monkeypatch, lambda: path.write_text("theirs"))
    done = memladder("quantize", "bloom", "--out", "out")
    assert (done.code, done.out) == (2, "")
    assert f"{path} is there already" in done.err
    assert [(p, p.read_text()) for p in Path("out").iterdir()] == [(path, "theirs")]


def test_an_interrupt_leaves_nothing(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_reading(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    done = memladder("quantize", "bloom", "--out", "out")
    assert (done.code, done.out) == (130, "")
    assert done.err.count("\n") == 1
    assert list(Path("out").iterdir()) == []


def test_a_file_that_vanishes_meanwhile_is_one_line(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_reading(monkeypatch, (bloom / SAFETENSORS).unlink)
    refused(memladder("quantize", "bloom", "--out", "out"), "bloom/model.safetensors: no such file")


def test_a_disk_that_is_too_small_is_known_before(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    done = memladder("quantize", "bloom", "--out", "out")
    refused(done, "folder out needs 0.3 MiB, only 3.0 MiB free; choose an --out on a larger disk")
    assert "MEMLADDER_CACHE" not in done.err


def test_a_disk_that_fills_up_leaves_nothing(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing.os, "fsync", full)
    refused(memladder("quantize", "bloom", "--out", "out"), "safetensors: No space left on device")


def test_no_packed_file_without_its_summary(
    memladder: Command, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str) -> None:
        raise UsageError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(quantize, "write_atomic", full)
    refused(memladder("quantize", "bloom", "--out", "out"), "int4.json: No space left on device")


# A layer of 294 MiB, all zeros, which the file system does not store.
LARGE = {"model_type": "bloom", "hidden_size": 3584, "n_head": 28, "n_layer": 1}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    shapes = models.tensor_shapes(models.layer_config("bloom", folder / "config.json"))
    table, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        table[f"h.0.{name}"] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with (folder / SAFETENSORS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PEAK = """
import re
from pathlib import Path
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10)
"""


def peak(code: str, *arguments: str | Path) -> int:
    """Highest resident memory of a process that runs `code`."""
    process = start(code + PEAK, *arguments)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    return int(out.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_stays_below_the_result_and_256_mib(large: Path, tmp_path: Path) -> None:
    modules = "checkpoint, packed_layer, packing"
    before = peak(
        "from memladder import formats; from memladder.cli.commands import quantize; "
        f"from memladder.engine.packed import {modules}"
    )
    code = (
        "from memladder.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code"
    )
    whole = peak(code, "quantize", large, "--format", "int1", "--out", tmp_path)
    result = (tmp_path / "bloom-layer0-int1.safetensors").stat().st_size
    assert (large / SAFETENSORS).stat().st_size > result + (256 << 20)
    assert whole - before <= result + (256 << 20)


def test_a_signal_to_a_real_process_leaves_nothing(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("from memladder.cli.main import main; main()", "quantize", large, "--out", out)
    until = time.monotonic() + 60
    while not list(out.glob(".*.part")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed, said.count("\n")) == (130, "", 1)
    assert list(out.iterdir()) == []
