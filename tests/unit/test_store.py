import json
from pathlib import Path

import pytest

from memladder.core.case import Workload
from memladder.core.errors import LockedError, UsageError
from memladder.core.plan import CompilerPlan
from memladder.core.record import Status, dumps
from memladder.sweeps import store
from memladder.sweeps.store import Store
from tests.unit import examples


def test_a_saved_record_is_read_back(tmp_path: Path) -> None:
    kept = Store(tmp_path / "log")
    path = kept.save(examples.record())
    assert path == tmp_path / "log" / "llama_pytorch_1_1.json"
    kept.save(examples.verification())
    contents = kept.read()
    assert contents.records == [examples.record()]
    assert contents.verifications == [examples.verification()]
    assert contents.foreign == {}
    assert [p.name for p in kept.folder.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\x00\xff", "null"])
def test_foreign_files_are_listed_and_can_be_set_aside(tmp_path: Path, text: str) -> None:
    kept = Store(tmp_path)
    path = kept.record_path("llama_pytorch_1_1")
    path.write_text(text)
    assert list(kept.read().foreign) == [path]
    assert kept.set_aside(path).read_text() == text
    path.write_text(text)
    assert kept.set_aside(path).name == "llama_pytorch_1_1.json.1"
    assert kept.read() == store.Contents()


def test_a_record_under_another_name_is_foreign(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.record_path("bloom_pytorch_1_1").write_text(dumps(examples.record()))
    assert list(kept.read().foreign.values()) == ["holds llama_pytorch_1_1, not bloom_pytorch_1_1"]


def test_another_machines_record_is_kept_when_replaced(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.save(examples.record(environment=examples.elsewhere()))
    kept.save(examples.record())
    (previous,) = (tmp_path / "previous").iterdir()
    assert store.read(previous).records == [examples.record(environment=examples.elsewhere())]
    kept.save(examples.record())
    assert len(list((tmp_path / "previous").iterdir())) == 1


def test_a_measured_record_survives_a_failure_of_its_repetition(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.save(examples.record())
    kept.save(examples.record(status=Status.FAILED, reason="it broke"))
    (previous,) = (tmp_path / "previous").iterdir()
    assert store.read(previous).records == [examples.record()]


def test_one_sweep_a_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path).locked(),
        pytest.raises(LockedError, match="another memladder"),
        Store(tmp_path).locked(),
    ):
        pass
    with Store(tmp_path).locked():
        pass


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file, not a folder")
    with (
        pytest.raises(UsageError, match="cannot write into folder"),
        Store(tmp_path / "log").locked(),
    ):
        pass


def test_results_files_merge_by_case(tmp_path: Path) -> None:
    path = tmp_path / "results" / "h100.json"
    old = examples.record(steady=(1,))
    other = examples.record(shape=Workload(32, 1))
    store.merge_results(path, [old, other], [examples.verification()])
    new = examples.record(steady=(2,))
    store.merge_results(path, [new], [])
    contents = store.read(path)
    assert contents.records == [new, other]
    assert contents.verifications == [examples.verification()]
    assert json.loads(path.read_text())["schema"] == 1


def test_a_failure_never_replaces_a_measurement_in_a_results_file(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    measured = examples.record()
    store.merge_results(path, [measured], [])
    failed = examples.record(status=Status.FAILED, reason="it broke")
    store.merge_results(path, [failed], [])
    assert store.read(path).records == [measured]


@pytest.mark.parametrize("text", ["", "{}", '{"schema":1,"records":[1],"verifications":[]}'])
def test_a_foreign_results_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        store.read(path)
    with pytest.raises(UsageError, match="cannot read"):
        store.read(tmp_path / "missing.json")


def test_a_plan_replaces_the_same_plan_made_elsewhere(tmp_path: Path) -> None:
    results = tmp_path / "h100.json"
    for device, size in (("cpu", 10), ("cuda:0", 20)):
        plan = CompilerPlan("NVIDIA A100", "compiler 1", {"weights": size}, {})
        planned = examples.record(
            device=device,
            framework="tensorrt",
            status=Status.PLANNED,
            reason="not here",
            asked_bytes=size,
            plan=plan,
        )
        store.merge_results(results, [planned], [])
    assert [record.asked_bytes for record in store.read(results).records] == [20]
