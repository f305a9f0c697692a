"""The meter on a real GPU: known bytes, given back when the runner dies, the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memladder.checks import calibration, doctor
from memladder.core import devices
from memladder.core.case import Case, Workload
from memladder.core.record import PHASES, Run, Source
from memladder.core.units import MIB
from memladder.frameworks._shared.base import Job
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.models import LayerConfig
from tests.gpu.conftest import comes_true


def known_bytes(size: int, folder: Path) -> Run:
    case = Case("calibration", "calibration", Workload(1, 1), "cuda:0")
    return runner.run_once(
        Job(case, LayerConfig("calibration", {"bytes": size}), folder),
        calibration.__name__,
        variables={},
        limits=runner.Limits(timeout_s=60.0),
        log_path=folder / "case.log",
        steady_s=0.5,
    )


@pytest.mark.parametrize("size", calibration.SIZES)
def test_the_meter_reads_known_bytes(size: int, tmp_path: Path) -> None:
    (reading,) = calibration.calibrate("cuda:0", tmp_path / "calibration.log", [size])
    assert abs(reading.read_bytes - size) <= 2 * MIB


def test_a_run_is_read_per_process_at_100_hz(tmp_path: Path) -> None:
    run = known_bytes(64 * MIB, tmp_path)
    assert run.source is Source.NVML_PROCESS
    assert run.polls_per_s >= 100
    assert run.longest_gap_s < 0.5
    assert tuple(phase.name for phase in run.phases) == PHASES
    assert run.phases[0].device_peak_bytes == 0
    assert run.phases[1].end_bytes > 50 * MIB


def test_repeats_agree(tmp_path: Path) -> None:
    sizes = [known_bytes(200 * MIB, tmp_path).steady_bytes for _ in range(3)]
    assert (max(sizes) - min(sizes)) / min(sizes) <= 0.005


def test_nothing_stays_on_the_device_when_the_runner_is_killed(
    device: devices.Device, tmp_path: Path
) -> None:
    idle = runner.settle(device)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from memladder.core.case import Case, Workload\n"
        "from memladder.frameworks._shared.base import Job\n"
        "from memladder.checks import calibration; from memladder.meter.outside import runner\n"
        "from memladder.models import LayerConfig\n"
        "case = Case('calibration', 'calibration', Workload(1, 1), 'cuda:0')\n"
        "job = Job(case, LayerConfig('calibration', {'bytes': 1 << 30}), Path(sys.argv[1]))\n"
        "runner.run_once(job, calibration.__name__, variables={}, limits=runner.Limits(),\n"
        "    log_path=Path(sys.argv[1]) / 'case.log', steady_s=600.0)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        assert comes_true(lambda: device.used_bytes() > idle + 1000 * MIB, 60)
    finally:
        driver.kill()
        driver.wait()
    assert comes_true(lambda: device.used_bytes() <= idle + 4 * MIB, 5)


def test_the_machine_and_the_doctor_know_the_gpu(device: devices.Device) -> None:
    machine = environment.machine("cuda:0")
    assert machine.device == device.name
    assert machine.device_memory_bytes > 1 << 30
    assert machine.driver
    assert machine.cuda
    assert "cuda:0" in {one.subject for one in doctor.findings()}
