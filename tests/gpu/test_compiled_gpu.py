"""Layers of many architectures compiled from ONNX, run by the Triton kernels on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from memladder.core.case import Workload
from memladder.engine.compile.compile import CompileOptions
from memladder.engine.run.layer import load_compiled
from memladder.kernels import cuda
from tests import hf_layers
from tests.unit.engine.test_compiled_architectures import LAUNCHES, run

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (2, 13), (1, 150)])
def test_the_compiled_layer_is_the_layer(
    name: str, batch_size: int, seq_len: int, tmp_path: Path
) -> None:
    layer = hf_layers.exported(name, batch_size, seq_len)
    found, _ = run(layer.path, layer.given, tmp_path, CompileOptions("welder"), cuda, "cuda")
    assert hf_layers.relative_error(found, layer.expected()) <= 2e-3


def test_run_and_load_layer_are_on_the_gpu(tmp_path: Path) -> None:
    layer = hf_layers.exported("llama", 1, 150)
    found, _ = run(layer.path, layer.given, tmp_path, CompileOptions(), cuda, "cuda")
    loaded, shape = load_compiled(tmp_path)
    assert (loaded.device.type, shape) == ("cuda", Workload(1, 150))
    assert hf_layers.relative_error(loaded(layer.given.cuda()).cpu(), found) <= 1e-3
