"""A sweep whose frameworks are checked, or can't be: what it exits with, and how often it tries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memladder import models
from memladder.core.case import Case, Workload
from memladder.core.errors import WorkerError
from memladder.core.record import Record
from memladder.core.verification import Check, Verification
from memladder.frameworks._shared.base import Availability, Framework, Job, Session
from memladder.meter.inside import worker
from memladder.meter.outside import runner
from memladder.models import reference, weights
from memladder.reports import table
from memladder.reports.cells import cells_from
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps.executors import serial
from memladder.sweeps.store import Store
from tests.unit import examples
from tests.unit.command import Command


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


NAN = float("nan")
WORDS = {
    "nan": "pytorch, llama 1x1: the output holds NaN or infinity: values beyond its dtype\n",
    "lost": (
        "pytorch, llama 1x1: 3.00e-01 is lost of the true layer, where its number format explains "
        "2.0e-01: its weights are others\n"
    ),
    "both": "pytorch, llama 1x1: the output holds NaN or infinity: values beyond its dtype\n",
}
CHECKS = {
    "nan": Check("llama", Workload(1, 1), 1, NAN, 2e-3),
    "lost": Check("llama", Workload(1, 1), 1, 1e-4, 2e-3, 0.3, 0.2),
    "both": Check("llama", Workload(1, 1), 1, NAN, 2e-3, NAN, 0.2),
}


@pytest.mark.parametrize("what", WORDS)
def test_verify_says_why_a_row_does_not_agree(
    what: str, memladder: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(examples.verification(), checks=(CHECKS[what],))
    monkeypatch.setattr(sweep_cases, "availability", lambda *_: Availability(True, "1"))
    monkeypatch.setattr(runner, "verify", lambda *_, **__: made)
    done = memladder("verify", "--frameworks", "pytorch", "--device", "cpu")
    assert done.code == 1
    assert WORDS[what] in done.err
    assert done.err.count("pytorch, llama 1x1: ") == 1
    assert " NO " in done.out


@pytest.mark.parametrize("what", WORDS)
def test_a_row_that_does_not_agree_is_none(what: str) -> None:
    record = examples.record()
    found = replace(examples.verification(), checks=(CHECKS[what],))
    (cell,) = cells_from([record], [found]).values()
    assert (cell.value, cell.note) == (None, "wrong output")
    (right,) = table.rows([record], {}, [examples.verification()])
    assert (right.steady_mib, right.reason) == (record.steady_bytes / (1 << 20), None)
    (row,) = table.rows([record], {}, [found])
    assert (row.steady_mib, row.peak_mib, row.over_import_mib) == (None, None, None)
    assert (row.status, row.reason) == ("measured", "wrong output")
    page = table.to_markdown_report([record], [found], {})
    assert f"{right.steady_mib:.1f}" not in page


class _Packed(Framework):
    """A framework whose weights are quantised: `output` is the reference's own, whatever it is."""

    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def availability(self, device: str) -> Availability:
        return Availability(True)

    def session(self, job: Job, announce: object) -> Session:
        raise NotImplementedError

    def tolerance(self, device: str) -> float:
        return 2e-3

    def reference(self, job: Job) -> np.ndarray:
        return self.output

    def quantisation_tolerance(self, job: Job) -> float:
        return 0.2


class _Session:
    def __init__(self, output: np.ndarray) -> None:
        self.output = lambda: output

    def settings(self) -> dict[str, str]:
        return {}


def test_a_worker_bounds_what_is_lost_of_the_true_layer(tmp_path: Path) -> None:
    config, shape = models.narrow_config("llama"), Workload(1, 5)
    job = Job(Case("llama", "pytorch", shape, "cpu"), config, tmp_path)
    path = weights.ensure(config, tmp_path, 0)
    true = reference.output(config, path, shape, 0)
    noise = np.random.default_rng(0).normal(size=true.shape).astype(np.float32)
    noise *= np.linalg.norm(true) / np.linalg.norm(noise)
    for lost, agrees in ((0.1, True), (0.3, False), (1.4, False)):
        own = true + lost * noise
        (check, *_) = worker._compared(_Packed(own), job, _Session(own)).checks  # type: ignore[arg-type]
        assert check.error == 0
        assert check.quantisation_tolerance == 0.2
        assert check.quantisation_error == pytest.approx(lost, rel=1e-4)
        assert (check.agrees, check.keeps_the_layer) == (agrees, agrees)
    own = true.copy()
    own[0, 0, 0] = np.nan
    (check, *_) = worker._compared(_Packed(true), job, _Session(own)).checks  # type: ignore[arg-type]
    assert np.isnan(check.error)
    assert not check.agrees
