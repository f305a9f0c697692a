"""TensorRT without a GPU: a narrow layer is compiled for an A100 for real, and planned."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.record import Status, dumps, loads_record
from memladder.core.units import MIB
from memladder.frameworks import tensorrt
from memladder.frameworks._shared.base import Job
from memladder.meter.outside import runner
from memladder.models import weights

FRAMEWORK = frameworks.get("tensorrt")

needs_rtx = pytest.mark.skipif(
    not FRAMEWORK.availability("cpu").plans, reason="TensorRT-RTX is not installed"
)


@needs_rtx
@pytest.mark.parametrize(
    ("model", "shape"),
    [("llama", Workload(1, 1)), ("llama", Workload(32, 1)), ("bloom", Workload(2, 300))],
)
def test_a_narrow_layer_is_compiled_for_an_a100_and_planned(
    model: str, shape: Workload, tmp_path: Path
) -> None:
    config = models.narrow_config(model)
    job = Job(Case(model, "tensorrt", shape, "cpu"), config, tmp_path)
    record = runner.measure(
        job, FRAMEWORK, repeats=1, limits=runner.Limits(300.0), log_path=tmp_path / "log"
    )
    assert record.status is Status.PLANNED, record.reason
    assert record.reason == "TensorRT runs on NVIDIA GPUs only; it compiles without one"
    assert not record.runs
    assert loads_record(dumps(record)) == record
    plan = record.plan
    assert plan is not None
    assert plan.target == "NVIDIA A100 (compute capability 8.0)"
    # Two bytes a parameter, in blocks of 512 bytes at most; a wide mask and biases come on top.
    assert 0 <= plan.parts["weights"] - weights.weight_bytes(config) < 512 * 16
    assert plan.parts["inputs_and_outputs"] == 2 * shape.tokens * models.hidden_size(config) * 2
    if model == "bloom":
        # The causal mask and ALiBi's slopes × positions, float16.
        alibi = shape.batch_size * config.values["n_head"] * shape.seq_len
        assert plan.parts["constants"] >= 2 * (shape.seq_len**2 + alibi)
    assert plan.parts["activations"] > 0
    assert record.asked_bytes == sum(plan.parts.values()) + plan.assumed["cuda_context"]
    # The engine holds the weights, and not much else.
    assert record.settings["engine_bytes"] > plan.parts["weights"]


def test_the_assumed_context_is_what_the_rerun_logged() -> None:
    data = resources.files("memladder.paper").joinpath("data", "figure11_rerun_a100.json")
    logged = json.loads(data.read_text())["invalid"]["bloom_tensorrt_32_1"]
    assert "CUDA context only" in logged["reason"]
    assert logged["value"] * MIB == tensorrt._CONTEXT_BYTES


@pytest.mark.parametrize(
    ("capability", "plans"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_gpus_that_rtx_refuses_are_planned(
    capability: tuple[int, int], plans: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "_module_name", lambda device: "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "compute_capability", lambda device: capability)
    monkeypatch.setattr(tensorrt, "installed", lambda name: True)
    found = FRAMEWORK.availability("cuda:0")
    assert (found.available, found.plans) == (True, plans)
    assert (found.reason is not None) == plans


def test_without_rtx_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_module_name", lambda device: None)
    assert FRAMEWORK.availability("cpu").install == "pip install 'memladder[tensorrt]'"
    monkeypatch.setattr(tensorrt, "_module_name", lambda device: "tensorrt")
    found = FRAMEWORK.availability("cpu")
    assert not found.available
    assert (
        found.reason == "TensorRT builds for the GPU that is there; tensorrt-rtx plans without one"
    )
    monkeypatch.setattr(tensorrt, "installed", lambda name: False)
    assert FRAMEWORK.availability("cuda:0").reason == "cuda-bindings not installed"
    monkeypatch.setattr(tensorrt, "installed", lambda name: True)
    assert FRAMEWORK.availability("cuda:0").available
