"""The runner with real processes and a GPU that is only played: what NVML says decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memladder import models
from memladder.core import devices, processes
from memladder.core.case import Case, Workload
from memladder.core.devices import Device
from memladder.core.errors import WorkerError
from memladder.core.record import Run, Source
from memladder.core.units import GIB, MIB
from memladder.frameworks._shared.base import Job
from memladder.meter.outside import runner
from memladder.models import LayerConfig
from tests.fake_nvml import FakeNvml, Gpu

FAKES = Path(__file__).parents[1] / "fake_frameworks"
FOREIGN = 2**22 + 5
IDLE = GIB

MeasureOn = Callable[..., Run]


class PlayedGpu(Gpu):
    """A GPU that holds, for each process below this one that has 40 MiB, what `told` says."""

    def __init__(self, told: Callable[[int], int | None]) -> None:
        super().__init__("GPU-played")
        self._told = told

    def _own(self) -> dict[int, int | None]:
        below = processes.descendants(os.getpid())
        return {pid: self._told(pid) for pid in below if processes.rss(pid) > 40 * MIB}

    @property
    def processes(self) -> dict[int, int | None]:
        return {**self._own(), FOREIGN: 3 * MIB}

    @processes.setter
    def processes(self, _: object) -> None:
        pass

    @property
    def used(self) -> int:
        return IDLE + 700 * MIB * bool(self._own())

    @used.setter
    def used(self, _: object) -> None:
        pass


@pytest.fixture
def measure_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MeasureOn:
    """Run a worker that takes 100 MiB on a played GPU."""
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{known}" if known else str(FAKES))

    def run(told: Callable[[int], int | None], tells_memory: bool = True) -> Run:
        gpu = PlayedGpu(told)
        gpu.tells_memory = tells_memory
        device = Device(FakeNvml(gpu), gpu)
        monkeypatch.setattr(devices, "device", lambda _: device)
        layer = models.narrow_config("llama").values
        values = {**layer, "script": {"weights": "allocate"}, "argument": 100 * MIB}
        case = Case("llama", "scripted", Workload(1, 1), "cuda:0")
        return runner.run_once(
            Job(case, LayerConfig("llama", values), tmp_path),
            "scripted",
            variables={},
            limits=runner.Limits(timeout_s=60.0),
            log_path=tmp_path / "case.log",
            steady_s=0.2,
        )

    return run


def test_the_headline_is_nvmls_bytes_of_the_process(measure_on: MeasureOn) -> None:
    run = measure_on(lambda _: 500 * MIB)
    assert run.source is Source.NVML_PROCESS
    assert run.steady_bytes == 500 * MIB
    assert run.idle_device_bytes == IDLE
    steady = run.phases[-1]
    assert steady.device_total_peak_bytes == IDLE + 700 * MIB
    assert steady.pss_peak_bytes > 100 * MIB
    (foreign,) = run.foreign
    assert (foreign.pid, foreign.name, foreign.peak_bytes) == (FOREIGN, "unknown", 3 * MIB)


def test_where_nvml_tells_no_bytes_the_delta_is_labelled(measure_on: MeasureOn) -> None:
    run = measure_on(lambda _: None)
    assert run.source is Source.NVML_DEVICE_DELTA
    assert run.steady_bytes == 700 * MIB
    assert [one.pid for one in run.foreign] == [FOREIGN]


def test_a_device_that_does_not_tell_its_memory_is_measured_by_process(
    measure_on: MeasureOn,
) -> None:
    run = measure_on(lambda _: 500 * MIB, tells_memory=False)
    assert run.source is Source.NVML_PROCESS
    assert run.steady_bytes == 500 * MIB
    assert run.idle_device_bytes is None
    assert run.phases[-1].device_total_peak_bytes is None


def test_a_device_that_tells_nothing_is_no_number(measure_on: MeasureOn) -> None:
    with pytest.raises(WorkerError, match="tells neither the device's bytes nor its processes'"):
        measure_on(lambda _: None, tells_memory=False)


def test_a_case_that_never_came_to_the_device_is_no_number(measure_on: MeasureOn) -> None:
    with pytest.raises(WorkerError, match="took no memory on the device"):
        measure_on(lambda _: MIB)
