"""The real LLaMA-2-70B layer, measured as a user measures it, three times under each framework."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memladder.core.record import PHASES, Source, Status
from memladder.core.units import MIB
from memladder.models.cache import default_dir
from memladder.sweeps import store

ROOT = Path(__file__).parents[2]
# figure11.md of the paper's facts: 855,654,400 parameters of two bytes.
WEIGHTS = 2 * 855_654_400
# Its two norms' weights, which stay float16 where a framework keeps float32 matrices.
NORMS = 2 * 2 * 8192


@pytest.mark.parametrize(
    "framework", [pytest.param("pytorch", marks=pytest.mark.slow), "onnxruntime"]
)
def test_the_real_layer_is_measured_and_repeats_agree(framework: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "measure_memory.py"), "--framework", framework),
            *("--model", "llama", "--batch_size", "1", "--seq_len", "1", "--device", "cpu"),
            *("--repeats", "3", "--output-dir", str(tmp_path), "--cache-dir", str(default_dir())),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    case_id = f"llama_{framework}_1_1"
    assert first == f"Measure the memory for llama batch 1 seq 1 under {framework}"
    (key, printed), *rest = ast.literal_eval(second).items()
    assert (key, rest) == (case_id, [])

    record = store.read(tmp_path / "log" / f"{case_id}.json").records[0]
    assert (tmp_path / "log" / f"{case_id}.log").exists()
    assert record.status is Status.MEASURED
    assert record.steady_bytes is not None
    assert printed == round(record.steady_bytes / MIB)
    assert record.layer is not None
    assert record.layer.weight_bytes == WEIGHTS
    assert record.spread is not None
    assert record.spread <= 0.02
    widened = record.settings.get("matrix_dtype") == "float32"
    held = 2 * WEIGHTS - NORMS if widened else WEIGHTS
    assert held < record.steady_bytes < held + 800 * MIB
    for run in record.runs:
        assert run.source is Source.PSS
        assert tuple(phase.name for phase in run.phases) == PHASES
        assert run.polls_per_s >= 100
        assert run.categories["weights"] == held
