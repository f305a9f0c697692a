"""The weights' file: what is in it, that it is the same for everyone, and how making it fails."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from memladder import models
from memladder.core.case import Workload
from memladder.core.errors import CacheError
from memladder.models import cache, weights


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_the_safetensors_library_reads_it(model: str, tmp_path: Path) -> None:
    config = models.narrow_config(model)
    path = weights.ensure(config, tmp_path, 0)
    tensors = load_file(path)
    assert {name: t.shape for name, t in tensors.items()} == models.tensor_shapes(config)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    assert sum(t.nbytes for t in tensors.values()) == weights.weight_bytes(config)
    content = path.read_bytes()
    for name, entry in weights.entries(config, 0).items():
        assert content[entry.offset : entry.offset + entry.length] == tensors[name].tobytes()


def test_the_data_starts_at_a_page(tmp_path: Path) -> None:
    for model in models.names():
        for config in (models.layer_config(model), models.narrow_config(model)):
            assert len(weights.header(config, 0)) % 4096 == 0
    path = weights.ensure(models.narrow_config("llama"), tmp_path, 0)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (length + 8) % 4096 == 0


def test_values_make_every_parameter_matter(tmp_path: Path) -> None:
    for model in models.names():
        path = weights.ensure(models.narrow_config(model), tmp_path, 0)
        for name, tensor in load_file(path).items():
            values = tensor.astype(np.float64)
            matrix = tensor.ndim == 2
            std = 1 / np.sqrt(tensor.shape[1]) if matrix else 0.1
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            assert values.std() == pytest.approx(std, rel=0.01 if matrix else 0.15), name
            assert values.mean() == pytest.approx(mean, abs=5 * std / np.sqrt(values.size)), name


def test_no_two_stretches_are_alike(tmp_path: Path) -> None:
    values = load_file(weights.ensure(models.narrow_config("bloom"), tmp_path, 0))
    stretches = {tensor.reshape(-1)[:64].tobytes() for tensor in values.values()}
    assert len(stretches) == len(values)
    config = models.narrow_config("bloom")
    long = weights.hidden_states(config, Workload(1, 4096), 0).reshape(-1)
    chunk = 1 << 20
    assert not np.array_equal(long[:64], long[chunk : chunk + 64])


def test_the_same_seed_is_the_same_file_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models.narrow_config("bloom")
    found = set()
    for cores in (1, 2, 7):
        monkeypatch.setattr(weights, "_cores", lambda cores=cores: cores)
        found.add(digest(weights.ensure(config, tmp_path / str(cores), 0)))
    assert len(found) == 1
    assert digest(weights.ensure(config, tmp_path, 1)) not in found


def test_hidden_states_are_standard_normal_and_seeded() -> None:
    config = models.narrow_config("llama")
    states = weights.hidden_states(config, Workload(2, 4096), 0)
    assert states.shape == (2, 4096, 256)
    assert states.dtype == np.float16
    assert states.astype(np.float64).mean() == pytest.approx(0, abs=0.005)
    assert states.astype(np.float64).std() == pytest.approx(1, rel=0.005)
    assert np.array_equal(states, weights.hidden_states(config, Workload(2, 4096), 0))
    assert not np.array_equal(states, weights.hidden_states(config, Workload(2, 4096), 1))


def test_it_is_made_once_and_tells_its_progress(tmp_path: Path) -> None:
    config = models.narrow_config("llama")
    told: list[tuple[int, int]] = []
    path = weights.ensure(config, tmp_path, 0, lambda done, total: told.append((done, total)))
    assert told[-1] == (weights.weight_bytes(config),) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    before = path.stat().st_mtime_ns
    assert weights.ensure(config, tmp_path, 0) == path
    assert path.stat().st_mtime_ns == before
    names = [".lock", "weights.safetensors", "weights.safetensors.sha256"]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    told = (path.parent / names[2]).read_text().splitlines()
    assert told[0] == f"{digest(path)}  {path.name}"


@pytest.mark.parametrize("damage", ["truncated", "header", "longer", "zeros"])
def test_a_damaged_file_is_made_again(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = models.narrow_config("llama")
    path = weights.ensure(config, tmp_path, 0)
    good = digest(path)
    with path.open("r+b") as file:
        if damage == "truncated":
            file.truncate(100_000)
        elif damage == "longer":
            file.seek(0, os.SEEK_END)
            file.write(b"x")
        elif damage == "zeros":
            file.seek(50_000)
            file.write(bytes(1000))
        else:
            file.seek(20)
            file.write(b"x")
    capsys.readouterr()
    assert digest(weights.ensure(config, tmp_path, 0)) == good
    assert (
        "is not as it was written: its SHA-256 differs; it is made again" in capsys.readouterr().err
    )


def test_two_processes_make_one_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from memladder import models;"
        "from memladder.models import weights;"
        "print(weights.ensure(models.narrow_config('bloom'), Path(sys.argv[1]), 0))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(paths) == 1
    assert set(load_file(paths.pop())) == set(models.tensor_shapes(models.narrow_config("bloom")))


def test_a_cache_that_is_no_folder_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CacheError, match="can't be written: Not a directory"):
        weights.ensure(models.narrow_config("llama"), blocked, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match="can't be written: Permission denied"):
        weights.ensure(models.narrow_config("llama"), tmp_path, 0)


def test_a_small_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 29, 1 << 29))
    with pytest.raises(CacheError, match=r"needs 4704\.4 MiB, only 512\.0 MiB free"):
        weights.ensure(models.layer_config("bloom"), tmp_path, 0)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="No space left on device"):
        weights.ensure(models.narrow_config("llama"), tmp_path, 0)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]


def test_the_default_folder_follows_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMLADDER_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_dir() == tmp_path / "memladder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_dir() == tmp_path / ".cache" / "memladder"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.default_dir() == tmp_path / "Library" / "Caches" / "memladder"
    monkeypatch.setenv("MEMLADDER_CACHE", str(tmp_path / "own"))
    assert cache.default_dir() == tmp_path / "own"
