"""Made files: damaged ones are made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from memladder import models
from memladder.core.case import Workload
from memladder.engine.compile import layers
from memladder.models import cache, onnx_export


@pytest.mark.parametrize("damaged", [b"", b"seven", b"sever bytes", b"seven bytes\n"])
def test_a_file_that_is_not_as_it_was_made_is_made_again(tmp_path: Path, damaged: bytes) -> None:
    path, made = tmp_path / "folder" / "x", 0

    def make(part: Path) -> None:
        nonlocal made
        made += 1
        part.write_bytes(b"seven bytes")

    assert cache.made(path, make) == path
    assert cache.made(path, make) == path
    assert made == 1
    path.write_bytes(damaged)
    assert not cache.is_whole(path)
    cache.made(path, make)
    assert (made, path.read_bytes()) == (2, b"seven bytes")
    path.unlink()
    cache.made(path, make)
    assert made == 3
    # A writer that was killed between the two files.
    (tmp_path / "folder" / "x.sha256").unlink()
    cache.made(path, make)
    assert made == 4
    assert not list((tmp_path / "folder").glob("*.part"))


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.made(tmp_path / "x", fail)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_a_damaged_graph_and_a_damaged_layer_are_made_again(tmp_path: Path) -> None:
    config = models.narrow_config("llama")
    layers.ensure(config, tmp_path)
    graph = onnx_export.ensure(config, tmp_path, Workload(1, 1), 0)
    exported = graph.read_bytes()
    (layer,) = tmp_path.glob("*/layer-*.json")
    text = layer.read_bytes()
    graph.write_bytes(exported[: len(exported) // 2])
    layer.write_bytes(text.replace(b"0", b"1", 1))
    layers.ensure(config, tmp_path)
    assert onnx_export.ensure(config, tmp_path, Workload(1, 1), 0).read_bytes() == exported
    assert layer.read_bytes() == text
