"""Welder on the CPU: compiled from ONNX, right, and as small as Ladder's fp16 program."""

from __future__ import annotations

from pathlib import Path

import pytest

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.frameworks._shared.base import Job, Session
from memladder.models import reference, weights
from tests import layers

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


def started(model: str, shape: Workload, cache_dir: Path) -> tuple[Job, Session]:
    """A session of a narrow layer that has run once."""
    job = Job(Case(model, "welder", shape, "cpu"), models.narrow_config(model), cache_dir)
    session, _ = layers.started(job)
    return job, session


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("shape", ["1x1", "32x1", "3x170", "1x1025"])
def test_the_layer_is_computed_right(model: str, shape: str, cache_dir: Path) -> None:
    job, session = started(model, Workload.parse(shape), cache_dir)
    path = weights.ensure(job.config, cache_dir, 0)
    expected = reference.output(job.config, path, job.case.shape, 0)
    assert reference.error(session.output(), expected) <= 2e-3


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_it_holds_fp16_weights_and_the_least_arena(model: str, cache_dir: Path) -> None:
    job, session = started(model, Workload(1, 1025), cache_dir)
    held, settings = session.categories(), session.settings()
    constants = 4 * (job.config.values.get("head_dim", 0) // 2 or job.config.values["n_head"])
    assert held["weights"] == weights.weight_bytes(job.config) + constants
    assert held["arena"] == held["arena_lower_bound"]
    assert settings["weight_format"] == settings["activation_format"] == "fp16"
    assert settings["compiled_from"] == "onnx"


def test_it_runs_what_ladder_runs_in_fp16(cache_dir: Path) -> None:
    job, _ = started("llama", Workload(2, 1), cache_dir)
    folder = weights.ensure(job.config, cache_dir, 0).parent
    before = sorted(folder.glob("packed-fp16-*.safetensors"))
    frameworks.get("ladder").prepare(job)
    assert len(before) == 1
    assert sorted(folder.glob("packed-fp16-*.safetensors")) == before
    assert frameworks.get("welder").makes(job) == frameworks.get("ladder").makes(job)


def test_its_variant_is_none_and_its_title_is_the_figures() -> None:
    assert [name for name in frameworks.names() if name.startswith("welder")] == ["welder"]
    assert frameworks.get("welder").title == "Welder"
