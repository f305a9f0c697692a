"""`quantize --all`, `generate`, `evaluate` as they are typed: what they write, say, refuse."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memladder.engine.compile import whole
from memladder.engine.packed import folder as folders
from memladder.engine.packed import packing
from tests import whole_models
from tests.unit.command import Command
from tests.whole_models import VOCABULARY, expected

pytestmark = pytest.mark.filterwarnings("default")
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A narrow Llama, and its checkpoint in six shards."""
    module = whole_models.model("llama")
    folder = whole_models.saved(module, tmp_path_factory.mktemp("llama") / "checkpoint", "40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return module, folder


@pytest.fixture(autouse=True)
def compiled(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLADDER_CACHE", str(cache_dir))


@pytest.fixture
def checkpoint(source: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return shutil.copytree(source[1], tmp_path / "copy", copy_function=shutil.copy2)


def test_what_is_written(source: tuple[Any, Path], memladder: Command, tmp_path: Path) -> None:
    module, checkpoint = source
    done = memladder(
        *("quantize", checkpoint, "--all", "--format", "int4", "--head-format", "nf4"),
        *("--keep", "model.layers.1.mlp.*", "--keep", "query", "--out", "packed"),
    )
    assert done.code == 0, done.err
    index = json.loads((tmp_path / "packed" / "memladder.json").read_text())
    files = [*index["layers"], index["rest"]]
    names = [f"layer-{number:05d}.safetensors" for number in range(LAYERS)]
    assert [one["file"] for one in files] == [*names, "rest.safetensors"]
    for one in files:
        data = (tmp_path / "packed" / one["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one["file_bytes"], one["sha256"])
        assert one["file"] in done.out
    # A layer's parameters, transformers' own count.
    parameters = sum(p.numel() for p in module.model.layers[0].parameters())
    assert [one["parameters"] for one in index["layers"]] == [parameters] * LAYERS
    kinds = [{m["name"]: m["format"] for m in one["matrices"]} for one in files]
    assert kinds[0]["query"] == kinds[1]["query"] == kinds[1]["up"] == "fp16"
    assert kinds[0]["up"] == kinds[1]["key"] == "int4"
    assert kinds[-1] == {"embedding": "fp16", "head": "nf4"}
    # Of normal weights int4 keeps 19 dB (docs); what is kept in fp16 lost nothing.
    losses = {m["name"]: m["sqnr_db"] for m in index["layers"][1]["matrices"]}
    assert losses["up"] is None
    assert losses["key"] == pytest.approx(19.1, abs=1.5)
    # Again: everything is there already, and stays.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    again = memladder(
        *("quantize", checkpoint, "--all", "--format", "int4", "--head-format", "nf4"),
        *("--keep", "model.layers.1.mlp.*", "--keep", "query", "--out", "packed"),
    )
    assert again.code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "packed").iterdir()} == before


def test_it_goes_on_where_it_was_stopped(
    source: tuple[Any, Path], memladder: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packing.pack
    stops = iter([False, True])

    def stopping(*arguments: Any, **options: Any) -> Any:
        if next(stops, False):
            arguments[3].write_bytes(b"half of it")
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "pack", stopping)
    command = ("quantize", source[1], "--all", "--format", "fp16", "--out", "packed")
    stopped = memladder(*command)
    assert stopped.code == 130
    packed = tmp_path / "packed"
    assert sorted(path.name for path in packed.iterdir()) == [
        "layer-00000.safetensors",
        "layer-00000.safetensors.sha256",
        "memladder.json",
    ]
    half = memladder("generate", "packed", "--ids", "1")
    assert half.code == 2
    assert "1 of 3 layers are packed; the same `memladder quantize --all`" in half.err
    other = memladder("quantize", source[1], "--all", "--format", "int4", "--out", "packed")
    assert other.code == 2
    assert "was begun with --format fp16 --head-format fp16" in other.err
    first = (packed / "layer-00000.safetensors").stat().st_mtime_ns
    assert memladder(*command).code == 0
    assert (packed / "layer-00000.safetensors").stat().st_mtime_ns == first
    assert memladder("generate", "packed", "--ids", "1", "--device", "cpu").code == 0


def test_generate_ids(
    source: tuple[Any, Path], memladder: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, checkpoint = source
    assert memladder("quantize", checkpoint, "--all", "--format", "fp16", "--out", "p").code == 0
    done = memladder(
        *("generate", "p", "--ids", "5, 6,7", "--max-new-tokens", "6", "--device", "cpu"),
        "--stats",
    )
    assert done.code == 0, done.err
    wanted = [5, 6, 7]
    for _ in range(6):
        wanted.append(int(expected(module, wanted)[-1].argmax()))
    assert done.out.strip() == ",".join(map(str, wanted[3:]))
    assert "tokens a second" in done.err
    assert "cpu: weights" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ids", "1,x"], "--ids '1,x' is no list of token ids"),
        (["--ids", f"{VOCABULARY}"], f"token {VOCABULARY} is none of 0 … {VOCABULARY - 1}"),
        (["--ids", ",".join(["1"] * 33)], "need a context of 33 tokens"),
        (["--ids", "1", "--max-new-tokens", "33"], "33 new ones need a context of 33 tokens"),
        (
            ["--prompt", "hello"],
            "the checkpoint has no tokenizer.json; give token ids: --ids 1,2,3",
        ),
        (["--prompt", "hello", "--ids", "1"], "one of --prompt, --ids and --interactive"),
        ([], "one of --prompt, --ids and --interactive"),
        (["--ids", "1", "--device", "cpu,tpu"], "'tpu' is no device"),
        (["--ids", "1", "--context", "600"], "this model knows positions up to 512"),
        (["--ids", "1", "--temperature", "-1"], "temperature -1.0 is not from 0 to 100"),
        (["--ids", "1", "--top-p", "2"], "top_p 2.0 is not above 0"),
        (["--ids", "1", "--cache-format", "int4"], "'int4' is no format of a cache"),
    ],
)
def test_generate_refuses(
    source: tuple[Any, Path],
    arguments: list[str],
    words: str,
    memladder: Command,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "refusing"
    if not folder.exists():
        whole_models.packed(source[1], folder)
    small = [] if "--context" in arguments else ["--context", "32"]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = memladder("generate", folder, *arguments, *small, *device)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_files_that_changed(source: tuple[Any, Path], memladder: Command, tmp_path: Path) -> None:
    folder = whole_models.packed(source[1], tmp_path / "packed")
    index = folders.opened(folder)
    path = folder / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(whole.FormatError, match="SHA-256"):
        folders.verify(folder, index, full=False)
    done = memladder("generate", folder, "--ids", "1", "--device", "cpu")
    assert done.code == 2
    assert f"{path} is not as it was written: its SHA-256 differs" in done.err
    path.write_bytes(data[:-1])
    done = memladder("generate", folder, "--ids", "1", "--device", "cpu")
    assert done.code == 2
    assert f"{len(data) - 1} bytes, {len(data)} by memladder.json" in done.err
    path.unlink()
    assert "no such file" in memladder("generate", folder, "--ids", "1", "--device", "cpu").err
    raw = json.loads((folder / "memladder.json").read_text())
    for spoilt in ({**raw, "memladder_model": 9}, {**raw, "layers": raw["layers"][1:]}, [], "x"):
        (folder / "memladder.json").write_text(json.dumps(spoilt))
        done = memladder("generate", folder, "--ids", "1", "--device", "cpu")
        assert (done.code, len(done.err.splitlines())) == (2, 1)


def _rewritten(checkpoint: Path, change: Any) -> None:
    """All tensors of the checkpoint in one file, after a change."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("model-*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def _without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _with(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _without("model.layers.2.mlp.up_proj.weight"),
            "model.layers.2.mlp.up_proj.weight is miss",
        ),
        (_without("lm_head.weight"), "tensor lm_head.weight is missing"),
        (_without("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            _with("model.layers.3.mlp.up_proj.weight", torch.zeros(96, 64)),
            "by config.json there are 3 layers",
        ),
        (
            _with("model.layers.1.mlp.up_proj.weight", torch.zeros(95, 64)),
            "is of shape [95, 64]; by config.json it is [96, 64]",
        ),
        (
            _with("model.embed_tokens.weight", torch.zeros(96, 64)),
            f"is of shape [96, 64]; by config.json it is [{VOCABULARY}, 64]",
        ),
        (_with("model.norm.weight", torch.zeros(64, dtype=torch.int32)), "is I32"),
        (_with("model.norm.weight", torch.full((64,), math.nan)), "NaN or infinity"),
        (_with("model.layers.1.mlp.up_proj.weight", torch.full((96, 64), math.inf)), "NaN or inf"),
    ],
)
def test_checkpoints_that_are_refused(
    checkpoint: Path, change: Any, words: str, memladder: Command
) -> None:
    _rewritten(checkpoint, change)
    done = memladder("quantize", checkpoint, "--all", "--format", "int4", "--out", "packed")
    assert done.code == 2
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(Path().glob("packed/*.part"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "int3"], "unknown format 'int3'"),
        (["--format", "int4", "--head-format", "x"], "unknown format 'x'"),
        (["--keep", "nothing*"], "no matrix is called 'nothing*'; there are: "),
    ],
)
def test_options_that_are_refused(
    source: tuple[Any, Path], arguments: list[str], words: str, memladder: Command, tmp_path: Path
) -> None:
    done = memladder("quantize", source[1], "--all", "--out", "packed", *arguments)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "packed").exists()


def test_a_missing_shard_and_folders_in_use(
    checkpoint: Path, memladder: Command, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    done = memladder("quantize", checkpoint, "--all", "--out", "used")
    assert done.code == 2
    assert "is in use" in done.err
    min(checkpoint.glob("model-*.safetensors")).unlink()
    done = memladder("quantize", checkpoint, "--all", "--out", "packed")
    assert done.code == 2
    assert "no such file" in done.err
    done = memladder("quantize", tmp_path / "none", "--all", "--out", "packed")
    assert "no such folder" in done.err
    done = memladder("quantize", checkpoint, "--keep", "query", "--out", "packed")
    assert "--keep and --head-format are for --all" in done.err


def test_evaluate_needs_a_text(
    source: tuple[Any, Path], memladder: Command, tmp_path: Path
) -> None:
    folder = whole_models.packed(source[1], tmp_path / "packed")
    (tmp_path / "text").write_text("hello")
    done = memladder("evaluate", folder, "--text", "text", "--reference", folder)
    assert done.code == 2
    assert "no tokenizer.json" in done.err
