"""The frameworks on a real GPU: right, repeatable, and stopped without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memladder import frameworks, models
from memladder.core import devices
from memladder.core.case import Case, Workload
from memladder.core.record import Source, Status
from memladder.core.units import GIB, MIB
from memladder.frameworks._shared.base import Job
from memladder.meter.outside import runner
from memladder.models.cache import default_dir
from tests.gpu.conftest import comes_true

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("pytorch", "onnxruntime")


def available(name: str) -> frameworks.Framework:
    framework = frameworks.get(name)
    found = framework.availability("cuda:0")
    if not found.available:
        pytest.skip(f"{name}: {found.reason}")
    return framework


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_three_repeats_of_the_real_layer_agree(name: str, tmp_path: Path) -> None:
    case = Case("llama", name, Workload(1, 1), "cuda:0")
    record = runner.measure(
        Job(case, models.layer_config("llama"), default_dir()),
        available(name),
        repeats=3,
        limits=runner.Limits(timeout_s=280),
        log_path=tmp_path / "case.log",
    )
    assert record.status is Status.MEASURED, record.reason
    assert record.spread is not None
    assert record.spread <= 0.005
    assert record.steady_bytes is not None
    # The layer's weights, a context, and less than 700 MiB of all the rest.
    assert 1632 * MIB + 400 * MIB < record.steady_bytes < 1632 * MIB + 1100 * MIB
    for run in record.runs:
        assert run.source is Source.NVML_PROCESS
        assert run.polls_per_s >= 100
        assert run.categories["weights"] == 1632 * MIB + 2 * 8192 * 2


def test_out_of_device_memory_is_a_status_with_what_was_asked_for(tmp_path: Path) -> None:
    case = Case("bloom", "pytorch", Workload(512, 4096), "cuda:0")
    record = runner.measure(
        Job(case, models.narrow_config("bloom"), tmp_path),
        available("pytorch"),
        repeats=1,
        limits=runner.Limits(timeout_s=280),
        log_path=tmp_path / "case.log",
    )
    assert (record.status, record.runs) == (Status.OOM, ())
    assert record.asked_bytes is not None
    assert record.asked_bytes > GIB


def test_a_killed_sweep_leaves_the_device_empty_and_resumes(
    device: devices.Device, tmp_path: Path
) -> None:
    available("pytorch")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(models.narrow_config("llama").values)))
    command = [
        *(sys.executable, str(ROOT / "run_all.py"), "--reproduce", "--models", "llama"),
        *("--config", str(config), "--frameworks", "pytorch", "--shapes", "1x1,1x64"),
        *("--device", "cuda", "--output-dir", str(tmp_path), "--cache-dir", str(tmp_path)),
    ]
    idle = runner.settle(device)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    sweep = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    first, second = (tmp_path / "log" / f"llama_pytorch_1_{n}.json" for n in (1, 64))
    assert comes_true(first.exists, 240)
    assert comes_true(lambda: device.used_bytes() > idle + 100 * MIB, 60)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    assert comes_true(lambda: device.used_bytes() <= idle + 4 * MIB, 5)
    assert not second.exists()
    kept = first.read_bytes()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert first.read_bytes() == kept
    assert second.exists()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_both_layers_agree_with_the_reference_at_all_shapes(name: str, tmp_path: Path) -> None:
    verification = runner.verify(
        name,
        available(name),
        "cuda:0",
        cache_dir=tmp_path,
        limits=runner.Limits(timeout_s=280),
        log_path=tmp_path / "case.log",
    )
    assert [c for c in verification.checks if not c.agrees] == []
    assert len(verification.checks) == 2 * (1 + 1 + 2)
