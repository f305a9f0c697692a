"""Digests beside files: read whole once, and again when anything about the file has changed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import memladder
from memladder import formats, models
from memladder.core import digests
from memladder.core.errors import FormatError, UsageError
from memladder.engine.compile import layers
from memladder.models import cache, gguf_export, weights

# transformers and ONNX's exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "name"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    # FIPS 180-2, B.1.
    digests.note(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    return path


def test_it_is_what_sha256sum_reads(file: Path) -> None:
    assert digests.of(file) == digests.noted(file)
    assert digests.fault(file, full=True) is None
    tool = shutil.which("sha256sum")
    if tool is not None:
        done = subprocess.run([tool, "--check", "name.sha256"], cwd=file.parent, text=True,
                              capture_output=True, check=False)  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "name: OK\n", "")


def test_a_second_look_reads_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = digests.of
    monkeypatch.setattr(digests, "of", lambda path: (reads.append(path), real(path))[1])
    assert digests.fault(file) is None
    assert reads == []
    # A new time, and a copy in its place: once each.
    os.utime(file)
    assert [digests.fault(file) for _ in range(3)] == [None] * 3
    assert len(reads) == 1
    shutil.copy2(file, file.with_name("copy"))
    file.with_name("copy").replace(file)
    assert [digests.fault(file) for _ in range(3)] == [None] * 3
    assert len(reads) == 2
    assert digests.fault(file, full=True) is None
    assert len(reads) == 3


def test_what_was_changed_and_dated_back_is_found(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.fault(file) == "is not as it was written: its SHA-256 differs"
    assert digests.fault(file) == "is not as it was written: its SHA-256 differs"


def test_a_digest_that_is_none_is_none(file: Path) -> None:
    for text in (b"", b"abc", b"\xff" * 100, b"0" * 63 + b"  name\n", b"0" * 10_000):
        digests.beside(file).write_bytes(text)
        assert digests.fault(file) == "has no name.sha256 beside it"
    digests.beside(file).unlink()
    os.mkfifo(digests.beside(file))
    assert digests.noted(file) is None


def test_a_file_is_digested_as_it_grows(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    with (tmp_path / "x").open("w+b", buffering=0) as file:
        digest = digests.Digest(file.fileno())
        for start in range(0, len(data), 700_000):
            file.write(data[start : start + 700_000])
            digest.up_to(min(start + 700_000, len(data)))
    assert digest.hex() == hashlib.sha256(data).hexdigest()


def _spoil(path: Path) -> bytes:
    good = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(good) - 1100)
        file.write(bytes(1000))
    assert path.read_bytes() != good
    return good


def test_every_file_of_the_cache_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = models.narrow_config("llama")
    made = [
        lambda: weights.ensure(config, tmp_path, 0),
        lambda: layers.ensure_packed(config, formats.get("int4"), tmp_path, 0),
    ]
    if importlib.util.find_spec("gguf") is not None:
        made.append(lambda: gguf_export.ensure(config, tmp_path, 0))
    for make in made:
        path = make()
        assert digests.noted(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        good = _spoil(path)
        capsys.readouterr()
        assert make().read_bytes() == good
        told = f"warning: {path} is not as it was written: its SHA-256 differs; it is made again\n"
        assert capsys.readouterr().err == told
        make()
        assert capsys.readouterr().err == ""
        # As an earlier version has left it.
        digests.beside(path).unlink()
        make()
        assert f"has no {path.name}.sha256 beside it; it is made again" in capsys.readouterr().err


def test_a_packed_file_of_the_users_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = models.narrow_config("llama")
    made = layers.ensure_packed(config, formats.get("int4"), tmp_path / "cache", 0)
    path = tmp_path / "own.safetensors"
    shutil.copyfile(made, path)
    shutil.copyfile(digests.beside(made), digests.beside(path))
    states = torch.zeros(1, 1, models.hidden_size(config), dtype=torch.float16)
    expected = memladder.load_layer(path, device="cpu")(states)
    _spoil(path)
    with pytest.raises(FormatError, match=r"own\.safetensors is not as it was written: its SHA"):
        memladder.load_layer(path, device="cpu")
    assert capsys.readouterr().err == ""
    shutil.copyfile(made, path)
    digests.beside(path).unlink()
    assert torch.equal(memladder.load_layer(path, device="cpu")(states), expected)
    told = f"{path} is not checked: no own.safetensors.sha256 beside it\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("what", ["file", "folder", "cache"])
def test_what_another_user_can_write_is_not_used(what: str, tmp_path: Path) -> None:
    def make() -> Path:
        return cache.made(tmp_path / "cache/folder/x", lambda part: part.write_bytes(b"ours"))

    path = make()
    open_to_all = {"file": path, "folder": path.parent, "cache": path.parent.parent}[what]
    open_to_all.chmod(0o777)
    with pytest.raises(UsageError, match=f"then: chmod go-w {open_to_all}$"):
        make()
    open_to_all.chmod(0o755)
    make()
    if os.geteuid() == 0:
        os.chown(open_to_all, 12345, -1)
        with pytest.raises(UsageError, match=f"{open_to_all} belongs to user 12345.*: chown "):
            make()


def test_what_is_made_is_ours_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = cache.made(tmp_path / "cache/folder/x", lambda part: part.write_bytes(b"ours"))
        cache.require_ours(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o022 == 0
