"""Whole narrow layers by the Triton kernels, against the same layers by their naive twins."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from memladder import formats, models
from memladder.core.case import Workload
from memladder.engine.compile import layers
from memladder.engine.packed import packed_layer
from memladder.engine.program.plan import plan
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.kernels import cuda, naive
from memladder.models import LayerConfig
from memladder.models.weights import hidden_states

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")


DEVICE = torch.device("cpu" if cuda.INTERPRETED else "cuda")


def output(
    config: LayerConfig,
    path: Path,
    shape: Workload,
    activation: str,
    kernels: ModuleType,
    chunk: int = 128,
) -> Tensor:
    kind = None if activation == "fp16" else formats.get(activation)
    layer = packed_layer.load(path)
    program = layer.form.program(shape, kind, chunk=chunk)
    planned = plan(program)
    # NaN, so that nothing is read before it was written.
    size = arena_bytes(program, planned, kernels)
    arena = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    block = torch.empty(packed_layer.device_bytes(layer), dtype=torch.uint8, device=DEVICE)
    layer = packed_layer.on_device(layer, block)
    execution = Execution(program, planned, layer, kernels, arena)
    execution.input.copy_(torch.from_numpy(hidden_states(config, shape, 0)).flatten(0, 1))
    execution.run()
    return execution.output.double()


# Weights, activations, and the largest ‖y − naive‖ / ‖naive‖.
ROWS = [
    *(("fp16", "fp16", 2e-3), ("int4", "fp16", 2e-3), ("nf4", "fp16", 2e-3)),
    *(("fp8", "fp8", 1e-2), ("mxfp8", "mxfp8", 1e-2), ("int1", "int8", 1e-2)),
]


@pytest.mark.parametrize(("weight", "activation", "bound"), ROWS)
# Few rows, and many. One row would take a minute a layer under the interpreter: its kernels are
# compared alone.
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        *(("llama", "7x1"), ("bloom", "7x1"), ("llama", "1x70")),
        pytest.param("bloom", "1x70", marks=pytest.mark.slow),
    ],
)
def test_the_layer(
    model: str, weight: str, activation: str, bound: float, shape: str, cache_dir: Path
) -> None:
    definition = models.definition(model)
    config = LayerConfig(model, definition.read(definition.NARROW))
    path = layers.ensure_packed(config, formats.get(weight), cache_dir, 0)
    found, expected = (
        output(config, path, Workload.parse(shape), activation, kernels)
        for kernels in (cuda, naive)
    )
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) <= bound
