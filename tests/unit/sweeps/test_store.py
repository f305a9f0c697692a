import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from memladder.core import record as record_text
from memladder.core.case import Workload
from memladder.core.errors import LockedError, UsageError
from memladder.core.plan import CompilerPlan
from memladder.core.record import Record, Status, dumps
from memladder.reports import cells, show, table
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


def _on(device: str) -> Record:
    machine = replace(examples.MACHINE, device="Test GPU", driver="1")
    return examples.record(
        device=device, environment=replace(examples.ENVIRONMENT, machine=machine)
    )


def test_devices_do_not_share_a_record(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    here, gpu = examples.record(), _on("cuda:0")
    gpu_check = replace(examples.verification(), device="cuda:0", environment=gpu.environment)
    assert kept.save(here).name == "llama_pytorch_1_1.json"
    assert kept.save(gpu).name == "llama_pytorch_1_1.cuda0.json"
    assert kept.save(examples.verification()).name == "verification_pytorch.json"
    assert kept.save(gpu_check).name == "verification_pytorch.cuda0.json"
    # Each stays where it is, also when it is measured again.
    kept.save(gpu)
    kept.save(here)
    contents = kept.read()
    assert contents.records == [gpu, here]
    assert contents.verifications == [gpu_check, examples.verification()]
    assert not contents.foreign
    assert not (tmp_path / "previous").exists()
    assert kept.name(gpu.case) == "llama_pytorch_1_1.cuda0"


def test_a_results_file_keeps_the_records_and_checks_of_each_device(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    here, gpu = examples.record(), _on("cuda:0")
    gpu_check = replace(examples.verification(), device="cuda:0", environment=gpu.environment)
    store.merge_results(path, [here], [examples.verification()])
    store.merge_results(path, [gpu], [gpu_check])
    store.merge_results(path, [gpu], [gpu_check])
    contents = store.read(path)
    assert contents.records == [here, gpu]
    assert contents.verifications == [examples.verification(), gpu_check]


_MERGE = """
import sys
from pathlib import Path
from memladder.core.case import Workload
from memladder.sweeps import store
from tests.unit import examples

first, path = int(sys.argv[1]), Path(sys.argv[2])
for number in range(first, first + 20):
    store.merge_results(path, [examples.record(shape=Workload(number, 1))], [])
"""


def test_processes_that_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    root = Path(__file__).parents[3]
    merging = [
        subprocess.Popen([sys.executable, "-c", _MERGE, str(first), str(path)], cwd=root)
        for first in (1, 101, 201)
    ]
    assert [process.wait(timeout=120) for process in merging] == [0, 0, 0]
    found = sorted(record.case.shape.batch_size for record in store.read(path).records)
    assert found == [*range(1, 21), *range(101, 121), *range(201, 221)]


def test_where_results_can_not_go_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "text.json").write_text("not a results file")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "file").write_text("")
    for name, reason in (
        ("log", "it is a folder"),
        ("text.json", "not a memladder record"),
        ("pipe.json", "not a file, but a pipe"),
        ("file/x.json", "cannot write into folder"),
    ):
        with pytest.raises(UsageError, match=reason):
            store.require_results(tmp_path / name)
    store.require_results(tmp_path / "new" / "x.json")
    store.merge_results(tmp_path / "old.json", [examples.record()], [])
    store.require_results(tmp_path / "old.json")


def test_a_damaged_entry_is_left_out_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    good = examples.record(), examples.record(shape=Workload(32, 1))
    store.merge_results(path, [*good], [examples.verification()])
    data = json.loads(path.read_text())
    data["records"][0]["asked_bytes"] = 10**400
    data["verifications"].append("no verification")
    path.write_text(json.dumps(data))
    damaged = path.read_bytes()
    contents = store.read(path)
    assert contents.records == [good[1]]
    assert contents.verifications == [examples.verification()]
    assert [line.split(" is ")[0] for line in contents.complaints()] == [
        f"{path}: records[0]",
        f"{path}: verifications[1]",
    ]
    (told,) = store.merge_results(path, [good[0]], [])
    assert told.startswith("2 damaged entries left out")
    assert (tmp_path / "h100.json.damaged").read_bytes() == damaged
    assert store.read(path).records == [*good]
    assert not store.read(path).damaged


def _mutations(value: Any, random: Random) -> Any:
    """The same JSON with one value somewhere replaced by an odd one, or a name added or gone."""
    odd = [
        10**400, -(10**25), 1 << 63, -1, 0, 1e308, "1" * (1 << 17), "\ud800", "$", "\x1b[2J", "NaN",
        None, True, [], {}, [[]], {"a": {"b": []}}, nested(40),
    ]  # fmt: skip
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one)))
        places += [(one, key) for key in keys]
        todo += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    holder, key = random.choice(places)
    act = random.randrange(4)
    if act == 0 and isinstance(holder, dict):
        del holder[key]
    elif act == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder[key]
    else:
        holder[key] = random.choice(odd)
    return value


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


@pytest.mark.parametrize("seed", range(300))
def test_whatever_is_in_a_record_only_that_record_is_lost(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    kept = Store(tmp_path)
    sound = examples.record(framework="onnxruntime")
    kept.save(sound)
    altered = [
        examples.record(steady=(3 << 20, 4 << 20)),
        examples.verification(),
        examples.record(status=Status.OOM, reason="full", asked_bytes=1 << 30),
    ][seed % 3]
    path = kept.save(altered)
    data = json.loads(path.read_text())
    for _ in range(random.randrange(1, 4)):
        data = _mutations(data, random)
    path.write_text(json.dumps(data))

    contents = kept.read()
    assert sound in contents.records
    assert list(contents.foreign) in ([], [path])
    assert all("\n" not in line for line in contents.complaints())
    records = contents.records
    table.to_markdown(table.rows(records, {}))
    table.to_csv(table.rows(records, {}))
    table.to_json(table.rows(records, {}))
    console = Console(file=io.StringIO(), width=120)
    for record in records:
        show.print_record(record, console)
        assert record_text.loads_record(record_text.dumps(record)) == record
    with contextlib.suppress(UsageError):
        cells.cells_from(records, contents.verifications)
        cells.notes_from(records)
        cells.device_label(records)
        table.to_markdown_report(records, contents.verifications, {})
    kept.save(examples.record())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema":1e400}', "missing fields"),
        ("[" * 100_000, "nested too deeply"),
        ('{"case":1,"case":2}', "'case' is there twice"),
        ('{"case":NaN}', "NaN is no number"),
        ('{"case":-Infinity}', "-Infinity is no number"),
        ("1" * 5000, "a memladder record"),
        ("1" * 4000, "'a huge integer'|a huge integer"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_no_record_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    kept = Store(tmp_path)
    kept.record_path("llama_pytorch_1_1").write_text(text, encoding="utf-8")
    (line,) = kept.read().complaints()
    assert re.search(reason, line)
    assert len(line) < 600


def test_what_is_no_file_is_set_aside_and_never_waited_for(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.save(examples.record())
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("/dev/zero")
    (tmp_path / "gone.json").symlink_to("nowhere")
    contents = kept.read()
    assert contents.records == [examples.record()]
    assert len(contents.foreign) == 4
    for path in contents.foreign:
        kept.set_aside(path)
    assert not kept.read().foreign
