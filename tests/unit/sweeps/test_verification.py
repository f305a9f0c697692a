"""A sweep whose frameworks are checked, or can't be: what it exits with, and how often it tries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memladder import models
from memladder.core.case import Case, Workload
from memladder.core.errors import WorkerError
from memladder.core.record import Record, Verification
from memladder.frameworks._shared.base import Availability, Framework, Job
from memladder.meter.outside import runner
from memladder.sweeps.executors import serial
from memladder.sweeps.store import Store
from tests.unit import examples


class _View:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def started(self, case: Case) -> None: ...

    def verifying(self, framework: str) -> None: ...

    def event(self, event: runner.Event) -> None: ...

    def finished(self, record: Record, seconds: float, resumed: bool) -> None: ...

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def _measured(job: Job, framework: Framework, **_: object) -> Record:
    return replace(examples.record(), case=job.case)


def _sweep(tmp_path: Path, view: _View) -> serial.Outcome:
    shapes = [Workload(1, 1), Workload(32, 1), Workload(1, 64)]
    cases = [
        Case("llama", name, shape, "cpu") for name in ("pytorch", "welder") for shape in shapes
    ]
    options = serial.SweepOptions(tmp_path, 1, runner.Limits())
    subjects = {"llama": models.Subject(models.layer_config("llama"))}
    return serial.sweep(cases, subjects, Store(tmp_path / "log"), options, view)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "availability", lambda *_: Availability(True, "1"))
    monkeypatch.setattr(serial.environment, "describe", lambda *_: examples.ENVIRONMENT)
    monkeypatch.setattr(runner, "measure", _measured)


def test_a_check_that_breaks_down_is_tried_once_and_fails_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def verify(name: str, *_: object, **__: object) -> Verification:
        tried.append(name)
        if name == "pytorch":
            raise WorkerError("pytorch: the worker was ended by SIGSEGV")
        return examples.verification(name)

    monkeypatch.setattr(runner, "verify", verify)
    view = _View()
    outcome = _sweep(tmp_path, view)
    assert tried == ["pytorch", "welder"]
    assert len(outcome.records) == 6
    assert outcome.unverified == ("pytorch",)
    assert [item.framework for item in outcome.verifications] == ["welder"]
    assert not outcome.succeeded
    assert view.warnings == [
        "pytorch could not be verified: pytorch: the worker was ended by SIGSEGV"
    ]


def test_a_sweep_succeeds_where_all_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "verify", lambda name, *_, **__: examples.verification(name))
    assert _sweep(tmp_path, _View()).succeeded
    monkeypatch.setattr(runner, "verify", lambda name, *_, **__: examples.verification(name, 1.0))
    assert not _sweep(tmp_path / "again", _View()).succeeded
