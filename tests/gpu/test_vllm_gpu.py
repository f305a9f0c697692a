"""vLLM's engine on a real GPU: it holds what the row says, and is caught where it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.core.units import MIB
from memladder.environments import ask, interpreter
from memladder.frameworks._shared.base import Job
from memladder.meter.outside import runner

FAKES = Path(__file__).parents[1] / "fake_frameworks"
LIMITS = runner.Limits(timeout_s=280)
ROWS = ("vllm", "vllm_fp16_int4")


@pytest.fixture(autouse=True)
def _available() -> None:
    found = ask.availability("vllm", frameworks.get("vllm"), "cuda:0")
    if not found.available:
        pytest.skip(f"vllm: {found.reason}")


@pytest.mark.parametrize("name", ROWS)
def test_one_layer_of_the_right_shapes_and_bytes_is_held(name: str, tmp_path: Path) -> None:
    verification = runner.verify(
        name,
        frameworks.get(name),
        "cuda:0",
        cache_dir=tmp_path,
        limits=LIMITS,
        log_path=tmp_path / "verify.log",
        shapes=[Workload(1, 1), Workload(2, 17)],
    )
    assert verification.structure is not None
    assert len(verification.structure) == 4
    assert verification.agrees, verification.structure


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("name", ROWS)
def test_a_narrow_layer_runs(name: str, model: str, tmp_path: Path) -> None:
    record = runner.measure(
        Job(Case(model, name, Workload(1, 600), "cuda:0"), models.narrow_config(model), tmp_path),
        frameworks.get(name),
        repeats=1,
        limits=LIMITS,
        log_path=tmp_path / "case.log",
    )
    assert record.status is Status.MEASURED, record.reason
    (run,) = record.runs
    assert 0 < run.categories["embeddings"] < MIB
    backend = record.settings["attention_backend"]
    assert backend == "TRITON_ATTN" if model == "bloom" else str(backend).startswith("FLASH")


def test_weights_that_stayed_fp16_are_no_int4_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{known}" if known else str(FAKES))
    if interpreter.chosen("vllm").label is not None:
        pytest.skip("the test's framework is found by this interpreter only")
    import misset_vllm

    case = Case("llama", "misset_vllm", Workload(1, 1), "cuda:0")
    record = runner.measure(
        Job(case, models.narrow_config("llama"), tmp_path),
        misset_vllm.FRAMEWORK,
        repeats=1,
        limits=LIMITS,
        log_path=tmp_path / "case.log",
        module="misset_vllm",
    )
    assert (record.status, record.runs) == (Status.FAILED, ())
    assert record.reason is not None
    assert "take 1.4 MiB where those of vLLM-W_INT4 A_FP16 take 0.4 MiB" in record.reason
