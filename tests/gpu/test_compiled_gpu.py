"""Layers of many architectures compiled from ONNX, run by the Triton kernels on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memladder.engine.compiler.compile import Options
from memladder.kernels import cuda
from tests import hf_layers
from tests.unit.test_compiled_architectures import EAGER, LAUNCHES, run

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (2, 13), (1, 150)])
def test_the_compiled_layer_is_the_layer(
    name: str, batch_size: int, seq_len: int, tmp_path: Path
) -> None:
    attention = "eager" if name in EAGER else "sdpa"
    module = hf_layers.layer(name, batch_size, seq_len, torch.float32, attention)
    given = hf_layers.states(module, batch_size, seq_len, torch.float32)
    path = hf_layers.export(module, given, tmp_path / "layer.onnx")
    found, _ = run(path, given, tmp_path, Options("welder"), cuda, "cuda")
    assert hf_layers.relative_error(found, module(given)) <= 2e-3
