"""Ladder's variants on the CPU: right, complete, as declared, and small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memladder import formats, frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.core.units import MIB
from memladder.frameworks import ladder
from memladder.frameworks._shared.base import Job, Session
from memladder.models import reference, weights
from memladder.models.cache import default_dir
from memladder.paper.rows import SYSTEMS
from memladder.reports import budget
from memladder.sweeps import store
from tests import layers

ROOT = Path(__file__).parents[2]
FIGURE = [name for name in SYSTEMS if name.startswith("ladder")]
OTHERS = ["ladder_fp16_int2", "ladder_fp16_mxfp4"]
# Signal to noise of a narrow layer's output, dB: what each variant keeps at least.
QUALITY = {
    "ladder": 66,
    "ladder_fp16_int4": 16,
    "ladder_fp16_nf4": 17.5,
    "ladder_fp8_fp8": 25.5,
    "ladder_mxfp8_mxfp8": 24.5,
    "ladder_int8_int1": 3.5,
    "ladder_fp16_int2": 7,
    "ladder_fp16_mxfp4": 16,
}

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")


def started(framework: str, model: str, shape: Workload, cache_dir: Path) -> tuple[Job, Session]:
    """A session of a narrow layer that has run once."""
    job = Job(Case(model, framework, shape, "cpu"), models.narrow_config(model), cache_dir)
    session, _ = layers.started(job)
    return job, session


def test_the_variants_are_the_figures_and_one_for_each_further_weight_format() -> None:
    ours = [name for name in frameworks.names() if name.startswith("ladder")]
    assert sorted(ours) == sorted([*FIGURE, *OTHERS])
    titles = {name: frameworks.get(name).title for name in FIGURE if name != "ladder"}
    assert titles == {name: SYSTEMS[name] for name in titles}


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("framework", [*FIGURE, *OTHERS])
def test_the_layer_is_computed_right(framework: str, model: str, cache_dir: Path) -> None:
    job, session = started(framework, model, Workload(3, 170), cache_dir)
    found = session.output()
    expected = frameworks.get(framework).reference(job)
    assert expected is not None
    assert found.shape == expected.shape
    assert reference.error(found, expected) <= 2e-3
    path = weights.ensure(job.config, cache_dir, 0)
    lost = reference.error(found, reference.output(job.config, path, job.case.shape, 0))
    assert lost < 10 ** (-QUALITY[framework] / 20)
    session.run()
    assert reference.error(session.output(), found) == 0


def unfilled(bits: int, columns: int) -> int:
    """Bytes of a row's last tile that hold no code."""
    return -(columns * bits // 8) % 64 if bits < 8 else 0


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("framework", FIGURE)
def test_what_is_held_is_what_the_formats_say(framework: str, model: str, cache_dir: Path) -> None:
    job, session = started(framework, model, Workload(1, 1), cache_dir)
    settings, held = session.settings(), session.categories()
    kind = formats.get(str(settings["weight_format"]))
    shapes = models.tensor_shapes(job.config)
    # Below 8 bits a narrow layer's rows fill tiles of 64 bytes; there are whole tiles of rows.
    exact = sum(
        shape[0] * (kind.row_bytes(shape[1]) + unfilled(kind.bits, shape[1]))
        if len(shape) == 2
        else 2 * shape[0]
        for shape in shapes.values()
    )
    constants = 4 * (job.config.values.get("head_dim", 0) // 2 or job.config.values["n_head"])
    assert held["weights"] == exact + constants
    assert held["arena"] == held["arena_lower_bound"]
    assert settings["bits_per_weight"] == pytest.approx(
        8 * held["weights"] / models.parameters(job.config), abs=1e-4
    )


def test_on_cuda_it_says_why_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = frameworks.get("ladder").availability("cuda:0")
    assert not found.available
    assert str(found.reason).endswith(("not installed", "is built without CUDA"))
    assert found.install == "pip install 'memladder[ladder-cuda]'"
    # Where all is installed it asks for the GPU's compute capability.
    monkeypatch.setattr(ladder, "installed", lambda name: True)
    monkeypatch.setattr(ladder, "cuda_build", lambda: "13.0")
    for capability, key, reason in (
        ((7, 5), "ladder", "Ladder needs compute capability 8.0; cuda:0 has 7.5"),
        ((8, 0), "ladder", None),
        ((8, 6), "ladder_fp8_fp8", "needs compute capability 8.9; cuda:0 has 8.6"),
        ((8, 6), "ladder_mxfp8_mxfp8", "needs compute capability 8.9; cuda:0 has 8.6"),
        ((8, 9), "ladder_fp8_fp8", None),
    ):
        monkeypatch.setattr(ladder, "compute_capability", lambda device, found=capability: found)
        said = frameworks.get(key).availability("cuda:0")
        assert said.available is (reason is None)
        assert said.reason is None if reason is None else str(said.reason).endswith(reason)


@pytest.mark.parametrize("framework", ["ladder_fp16_int4", "ladder_int8_int1"])
def test_the_real_layer_lies_at_its_budget(framework: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "measure_memory.py"), "--framework", framework),
            *("--model", "llama", "--batch_size", "32", "--seq_len", "1", "--device", "cpu"),
            *("--output-dir", str(tmp_path), "--cache-dir", str(default_dir())),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, printed = done.stdout.splitlines()
    (record,) = store.read(tmp_path / "log" / f"llama_{framework}_32_1.json").records
    assert record.status is Status.MEASURED
    assert record.steady_bytes is not None
    assert ast.literal_eval(printed) == {record.case.id: round(record.steady_bytes / MIB)}
    (row,) = budget.rows([record])
    # figure11.md's table, MiB: int4 420.8, int1 102.2; activations 2.8.
    weight_mib = {"ladder_fp16_int4": 420.8, "ladder_int8_int1": 102.2}[framework]
    assert row.budget.weights / MIB == pytest.approx(weight_mib, abs=0.05)
    assert row.used > row.budget.weights, "all weights were read"
    assert row.used <= 1.05 * (weight_mib + 2.8) * MIB + 64 * MIB
    assert row.holds
