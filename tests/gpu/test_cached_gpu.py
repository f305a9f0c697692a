"""Layers with a key-value cache on the GPU: a CUDA graph that serves every position."""

from __future__ import annotations

import pytest
import torch

from memladder.core.case import Workload
from memladder.engine.program.cache import CacheShape
from memladder.engine.run.driver import CudaGraph
from memladder.kernels import cuda
from tests import hf_layers
from tests.cached import CachedRunner
from tests.unit.engine.test_cached_layers import packed, states, whole
from tests.unit.engine.test_cached_layers import test_triton_s_kernels as test_triton_s_kernels

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("format", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_one_graph_serves_every_position(name: str, format: str) -> None:
    layer = packed(name)
    tokens = 150
    given = states(layer, tokens)
    step = Workload(1, 1)
    cache = CacheShape(slots=2, context=tokens, chunk=1, format=format)
    runner = CachedRunner(layer, cache, cuda, [step], device="cuda")
    execution, positions = runner.bound[step]
    # Recorded while the sequence is idle.
    execution.input.zero_()
    graph = CudaGraph(execution.run, torch.device("cuda", torch.cuda.current_device()))
    found = []
    for position, token in enumerate(given):
        positions.set([1], [position], [1])
        execution.input.copy_(token.unsqueeze(0))
        graph.run()
        found.append(execution.output.cpu())
    graph.close()
    error = hf_layers.relative_error(torch.cat(found), whole(layer, given))
    assert error <= (2e-3 if format == "fp16" else 2e-2)
    eager = CachedRunner(layer, cache, cuda, [step], device="cuda")
    assert torch.equal(torch.cat(found), eager.in_turn(step, given, slot=1))
