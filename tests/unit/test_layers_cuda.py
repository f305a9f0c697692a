"""Whole narrow layers by the Triton kernels, against the same layers by their naive twins."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from memladder import formats, models
from memladder.case import Shape
from memladder.engine import packed_layer, packing, programs
from memladder.engine.execute import Execution
from memladder.engine.plan import plan
from memladder.kernels import cuda, naive
from memladder.models import LayerConfig
from memladder.models.weights import fill_hidden_states

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def output(
    config: LayerConfig, path: Path, shape: Shape, activation: str, kernels: ModuleType
) -> Tensor:
    kind = None if activation == "fp16" else formats.get(activation)
    program = programs.definition(config.model).program(config.values, shape, kind, chunk=64)
    planned = plan(program)
    # NaN, so that nothing is read before it was written.
    arena = torch.full((planned.nbytes,), 255, dtype=torch.uint8)
    execution = Execution(program, planned, packed_layer.load(path), kernels, arena)
    fill_hidden_states(execution.input.numpy(), 0)
    execution.run()
    return execution.output.double()


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize(
    ("weight", "activation", "bound"),
    [
        *(("fp16", "fp16", 2e-3), ("int4", "fp16", 2e-3), ("nf4", "fp16", 2e-3)),
        *(("fp8", "fp8", 1e-2), ("mxfp8", "mxfp8", 1e-2), ("int1", "int8", 1e-2)),
    ],
)
@pytest.mark.parametrize("shape", ["7x1", "1x130"])
def test_the_layer(
    model: str, weight: str, activation: str, bound: float, shape: str, cache_dir: Path
) -> None:
    definition = models.definition(model)
    config = LayerConfig(model, definition.read(definition.NARROW))
    path = packing.ensure(config, formats.get(weight), cache_dir, 0)
    found, expected = (
        output(config, path, Shape.parse(shape), activation, kernels) for kernels in (cuda, naive)
    )
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) <= bound
