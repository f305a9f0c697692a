"""`memladder cache`: what is listed, verified and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memladder.core import digests
from memladder.models import cache
from tests.unit.command import Command

PLACES = {
    "weights": "llama-0123456789ab-seed0/weights.safetensors",
    "packed": "llama-0123456789ab-seed0/packed-int4-01234567.safetensors",
    "graph": "llama-0123456789ab-seed0/layer-1x1-01234567.onnx",
    "engine": "llama-0123456789ab-seed0/layer-1x1-01234567-tensorrt_rtx-01234567.engine",
    "gguf": "llama-0123456789ab-seed0/layer-q4_0-1-gguf0.17.1.gguf",
    "outline": "llama-0123456789ab/outline-01234567.onnx",
    "layer": "llama-0123456789ab/layer-01234567.json",
    "model": "models/0123456789abcdef.json",
    "tuning": "tuning/H200.json",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    for number, place in enumerate(PLACES.values()):
        cache.made(folder / place, lambda part, n=number: part.write_bytes(b"x" * n))  # type: ignore[misc]
    os.utime(folder / PLACES["weights"], (0, 0))
    return folder


def _listed(memladder: Command, root: Path, *options: str) -> dict[str, dict[str, object]]:
    done = memladder("cache", "--json", "--cache-dir", root, *options)
    assert (done.code, done.err) == (0, "")
    return {entry["kind"]: entry for entry in json.loads(done.out)["entries"]}


def test_every_kind_is_listed(memladder: Command, root: Path) -> None:
    found = _listed(memladder, root)
    assert {kind: entry["path"] for kind, entry in found.items()} == PLACES
    assert [entry["bytes"] for entry in found.values()] == list(range(len(PLACES)))
    assert found["layer"]["model"] == "llama-0123456789ab"
    assert [kind for kind, entry in found.items() if entry["age_s"] > 86_400] == ["weights"]  # type: ignore[operator]
    done = memladder("cache", "--cache-dir", root)
    assert done.code == 0
    assert all(Path(place).name in done.out for place in PLACES.values())
    assert done.out.endswith(f"{root}: 9 there, 0.0 MiB\n")
    assert memladder("cache", "--cache-dir", root / "none").out.endswith(": 0 there, 0.0 MiB\n")


def test_verify_names_what_differs(memladder: Command, root: Path) -> None:
    done = memladder("cache", "--verify", "--cache-dir", root)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("all are as they were made\n")
    path = root / PLACES["gguf"]
    before = path.stat()
    path.write_bytes(b"y" * before.st_size)
    # As a disk does it: the file system tells nothing.
    told = digests.beside(path).read_text().splitlines()
    found = path.stat()
    stamp = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    digests.beside(path).write_text(f"{told[0]}\n# last read whole: {stamp}\n")
    assert digests.fault(path) is None
    done = memladder("cache", "--verify", "--cache-dir", root)
    assert (done.code, done.err) == (
        1,
        f"{path} is not as it was written: its SHA-256 differs\n",
    )
    digests.beside(path).unlink()
    assert memladder("cache", "--verify", "--cache-dir", root).code == 1
    assert memladder("cache", "--verify", "--kind", "weights,layer", "--cache-dir", root).code == 0


def test_removing_by_kind_and_by_age(memladder: Command, root: Path, tmp_path: Path) -> None:
    # Links lead nowhere: what they point to is not the cache's.
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("weights.safetensors", "layer-1.onnx"):
        (outside / name).write_text("theirs")
    (root / "link").symlink_to(outside)
    (root / "models/other.json").symlink_to(outside / "weights.safetensors")
    (root / "triton").mkdir()
    (root / "triton/link").symlink_to(outside)
    assert set(_listed(memladder, root)) == {*PLACES, "triton"}
    done = memladder("cache", "--remove", "--kind", "gguf,triton", "--cache-dir", root)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(": 2 removed, 0.0 MiB\n")
    assert set(_listed(memladder, root)) == PLACES.keys() - {"gguf"}
    assert not digests.beside(root / PLACES["gguf"]).exists()
    assert memladder("cache", "--remove", "--older-than", "1", "--cache-dir", root).code == 0
    assert set(_listed(memladder, root)) == PLACES.keys() - {"gguf", "weights"}
    assert memladder("cache", "--remove", "--kind", "all", "--cache-dir", root).code == 0
    assert _listed(memladder, root) == {}
    assert sorted(path.read_text() for path in outside.iterdir()) == ["theirs"] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--remove",), "--remove takes --kind, --older-than or both"),
        (("--kind", "wieghts"), "unknown kind 'wieghts'; known: weights, packed, "),
        (("--older-than", "-1"), "older-than '-1' is not a number of days"),
        (("--older-than", "nan"), "older-than 'nan' is not a number of days"),
        (("--remove", "--verify", "--kind", "all"), "give one of them"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], words: str, memladder: Command, tmp_path: Path
) -> None:
    done = memladder("cache", *options, "--cache-dir", tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err
