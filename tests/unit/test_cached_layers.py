"""Decoder layers with a key-value cache, against the same layers over whole sequences."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as remembered
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.engine.compile import bundle
from memladder.engine.compile.compile import CompileOptions, compile_file
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.plan import plan
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.kernels import naive
from tests import hf_layers
from tests.cached import CachedRunner

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

NAMES = ("llama", "bloom", "qwen3", "gemma2", "gpt_neox", "falcon", "opt")
# Their parts are those of the others, put together in other ways.
MORE = (
    *(
        "falcon_alibi",
        "mistral",
        "hunyuan",
        "gptj",
        "phi",
        "gpt2",
        "glm4",
        "mpt",
        "olmo2",
        "cohere",
    ),
)


@remembered
def packed(name: str) -> PackedLayer:
    """A layer exported as all are, 2 × 65 tokens without a past, for any shape."""
    path = hf_layers.exported(name, 2, 65).path
    with TemporaryDirectory() as folder:
        target = Path(folder) / bundle.WEIGHTS
        bundle.pack(compile_file(path, CompileOptions()), target)
        layer = packed_layer.load(target)
        block = torch.empty(packed_layer.device_bytes(layer), dtype=torch.uint8)
        layer = packed_layer.on_device(layer, block)
    return replace(layer, form=replace(layer.form, shape=None))


def states(layer: PackedLayer, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, layer.form.fused.hidden_size, generator=generator).half()


def whole(layer: PackedLayer, given: Tensor) -> Tensor:
    """One sequence through the program without a cache."""
    program = layer.form.program(Workload(1, len(given)))
    planned = plan(program)
    arena = torch.full((arena_bytes(program, planned, naive),), 255, dtype=torch.uint8)
    execution = Execution(program, planned, layer, naive, arena)
    execution.input.copy_(given)
    execution.run()
    return execution.output.clone()


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_whatever_is_compiled_has_a_past(name: str) -> None:
    layer = packed(name)
    given = states(layer, 63)
    expected = whole(layer, given)
    for size in (63, 17, 7, 1):
        cache = CacheShape(slots=3, context=64, chunk=size)
        workload = Workload(1, size)
        runner = CachedRunner(layer, cache, naive, [workload])
        found = runner.in_turn(workload, given, slot=1)
        assert hf_layers.relative_error(found, expected) <= 2e-3, size
