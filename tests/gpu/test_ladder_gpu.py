"""The engine on a GPU: odd shapes, nothing but its own kernels, and as little memory as planned."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch

from memladder import formats, frameworks, load_layer, models
from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.engine.compile import layers
from memladder.engine.run.driver import CudaGraph
from memladder.frameworks._shared.base import Job
from memladder.kernels import cuda, naive
from memladder.meter.outside import runner
from memladder.models.cache import default_dir
from memladder.models.weights import hidden_states
from memladder.reports import budget
from tests.unit.engine.test_layers_cuda import ROWS, output

# By import_module: some modules are hidden by the function of the same name.
KERNELS = [import_module(f"{cuda.__name__}.{one.name}") for one in iter_modules(cuda.__path__)]


@pytest.mark.parametrize("shape", ["1x1", "1x17", "1x333", "7x1", "32x1", "7x33", "1x4095"])
@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize(("weight", "activation", "bound"), ROWS)
def test_odd_shapes(
    model: str, weight: str, activation: str, bound: float, shape: str, cache_dir: Path
) -> None:
    config = models.narrow_config(model)
    path = layers.ensure_packed(config, formats.get(weight), cache_dir, 0)
    expected, found, again = (
        output(config, path, Workload.parse(shape), activation, kernels, 512)
        for kernels in (naive, cuda, cuda)
    )
    assert found.isfinite().all()
    assert torch.equal(found, again)
    assert float((found - expected).norm() / expected.norm()) <= bound


def own_names() -> set[str]:
    """What Triton calls the kernels of the engine's modules."""
    return {
        name
        for module in KERNELS
        for name, value in vars(module).items()
        if isinstance(value, cuda.target.triton.JITFunction)
    }


@pytest.mark.parametrize("key", ["ladder", "ladder_fp16_int4", "ladder_int8_int1"])
@pytest.mark.parametrize("shape", ["1x1", "1x600"])
def test_nothing_but_its_own_kernels_runs(key: str, shape: str, cache_dir: Path) -> None:
    config = models.narrow_config("llama")
    job = Job(Case("llama", key, Workload.parse(shape), "cuda:0"), config, cache_dir)
    framework = frameworks.get(key)
    framework.prepare(job)
    session = framework.session(job, [].append)
    session.context()
    with torch.profiler.profile(acc_events=True) as profile:
        session.weights()
        session.compile()
        session.run()
    on_device = {
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    copies = {name for name in on_device if name.startswith(("Memcpy", "Memset"))}
    assert on_device - copies
    assert on_device - copies <= own_names()


@pytest.mark.parametrize("shape", ["1x1", "1x4096"])
def test_the_real_layer_lies_at_its_budget(shape: str, tmp_path: Path) -> None:
    case = Case("llama", "ladder_fp16_int4", Workload.parse(shape), "cuda:0")
    record = runner.measure(
        Job(case, models.layer_config("llama"), default_dir()),
        frameworks.get("ladder_fp16_int4"),
        repeats=1,
        limits=runner.Limits(timeout_s=280),
        log_path=tmp_path / "case.log",
    )
    assert record.status is Status.MEASURED, record.reason
    (row,) = budget.rows([record], "cuda")
    assert row.used <= row.bound
    assert row.used > row.budget.nbytes


def test_a_layer_is_called_with_tensors_of_its_gpu(cache_dir: Path) -> None:
    config = models.narrow_config("llama")
    path = layers.ensure_packed(config, formats.get("int4"), cache_dir, 0)
    states = torch.from_numpy(hidden_states(config, Workload(2, 60), 0)).view(2, 60, -1)
    expected = load_layer(path, device="cpu")(states)
    layer = load_layer(path)
    assert layer.device == torch.device("cuda", torch.cuda.current_device())
    found = layer(states.cuda())
    assert found.device == layer.device
    assert float((found.cpu() - expected).norm() / expected.norm()) <= 2e-3


def test_a_graph_runs_what_it_recorded() -> None:
    x, out = torch.arange(8, device="cuda").half().view(1, 8), torch.empty(1, 8).half().cuda()
    weight = torch.ones(8).half().cuda()
    graph = CudaGraph(lambda: cuda.rms_norm(x, weight, out, eps=0.0), torch.device("cuda", 0))
    x += 1
    torch.cuda.synchronize()
    graph.run()
    values = torch.arange(1, 9).float()
    expected = values / values.square().mean().sqrt()
    assert graph.launches == 1
    assert float((out.cpu().float() - expected).norm() / expected.norm()) < 1e-3
    graph.close()
