"""What a sweep measures again: what others starved, and what the user names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from memladder import models
from memladder.core.case import Case, Workload
from memladder.core.record import Record, Status
from memladder.frameworks._shared.base import Availability, Framework, Job
from memladder.meter.outside import runner
from memladder.sweeps.executors import serial
from memladder.sweeps.store import Store
from tests.unit import examples
from tests.unit.sweeps.test_verification import _View

CASE = Case("llama", "pytorch", Workload(1, 1), "cpu")
SUBJECTS = {"llama": models.Subject(models.layer_config("llama"))}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that is read as on the machine of the examples; measuring says `measured`."""

    def measured(job: Job, framework: Framework, **_: object) -> Record:
        return replace(examples.record(), case=job.case)

    monkeypatch.setattr(serial, "availability", lambda *_: Availability(True, "1"))
    monkeypatch.setattr(serial.environment, "describe", lambda *_: examples.ENVIRONMENT)
    monkeypatch.setattr(runner, "measure", measured)
    monkeypatch.setattr(runner, "verify", lambda *_, **__: examples.verification())
    return Store(tmp_path / "log")


def swept(store: Store, status: Status, retry: frozenset[Status]) -> serial.Outcome:
    """A sweep of one case that ended so before."""
    layer = replace(examples.LAYER, digest=SUBJECTS["llama"].config.digest)
    changes = {} if status is Status.MEASURED else {"reason": "it ended so"}
    store.save(examples.record(status=status, layer=layer, **changes))
    options = serial.SweepOptions(store.folder, 1, runner.Limits(), retry=retry)
    return serial.sweep([CASE], SUBJECTS, store, options, _View())


@pytest.mark.parametrize("status", [Status.BUSY, Status.FAILED, Status.TIMEOUT])
def test_what_is_not_final_is_measured_again(store: Store, status: Status) -> None:
    assert swept(store, status, frozenset()).records[0].status is Status.MEASURED


def test_out_of_memory_is_final_unless_the_user_says_so(store: Store) -> None:
    assert swept(store, Status.OOM, frozenset()).records[0].status is Status.OOM
    retried = swept(store, Status.OOM, frozenset({Status.OOM, Status.FAILED}))
    assert retried.records[0].status is Status.MEASURED


def test_a_busy_case_fails_the_sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(job: Job, framework: Framework, **_: object) -> Record:
        return examples.record(status=Status.BUSY, reason="others: vllm (12) 70.0 GiB")

    monkeypatch.setattr(runner, "measure", busy)
    outcome = swept(store, Status.FAILED, frozenset())
    assert not outcome.succeeded
    (kept,) = store.read().records
    assert (kept.status, kept.reason) == (Status.BUSY, "others: vllm (12) 70.0 GiB")


def test_a_log_folder_that_is_removed_meanwhile_is_made_again(store: Store) -> None:
    with store.locked():
        shutil.rmtree(store.folder)
        store.save(examples.record())
    assert store.read().records == [examples.record()]
