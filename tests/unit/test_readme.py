"""The pages' tables are what the records in `results/` say; the README's what is printed."""

import json
import re
import shlex
from pathlib import Path

import pytest

from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.core.units import GIB, mib
from memladder.paper import published
from memladder.paper.rows import MODELS, SHAPES
from memladder.reports import budget
from memladder.sweeps import store
from tests.unit.command import Command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


H100 = ("h100.json", "cuda:0")
CPU = ("cpu.json", "cpu")


@pytest.mark.parametrize(
    ("where", "framework", "name"),
    [
        (H100, "pytorch", "PyTorch-Inductor"),
        (H100, "onnxruntime", "ONNX Runtime"),
        (H100, "vllm", "vLLM"),
        (H100, "vllm_fp16_int4", "vLLM int4"),
        (H100, "welder", "Welder fp16"),
        (H100, "ladder", "Ladder fp16"),
        (H100, "ladder_fp16_int4", "Ladder int4"),
        (H100, "ladder_fp16_nf4", "Ladder nf4"),
        (H100, "ladder_fp8_fp8", "Ladder fp8"),
        (H100, "ladder_mxfp8_mxfp8", "Ladder mxfp8"),
        (H100, "ladder_int8_int1", "Ladder int1"),
        (H100, "bitsandbytes_fp16_nf4", "bitsandbytes nf4"),
        (H100, "gemlite_fp16_int4", "gemlite int4"),
        (H100, "torchao_fp16_int4", "torchao int4 (bf16)"),
        (CPU, "pytorch", "PyTorch-Inductor"),
        (CPU, "onnxruntime", "ONNX Runtime"),
        (CPU, "welder", "Welder fp16"),
        (CPU, "ladder", "Ladder fp16"),
        (CPU, "ladder_fp16_int4", "Ladder int4"),
        (CPU, "ladder_fp16_nf4", "Ladder nf4"),
        (CPU, "ladder_fp8_fp8", "Ladder fp8"),
        (CPU, "ladder_mxfp8_mxfp8", "Ladder mxfp8"),
        (CPU, "ladder_int8_int1", "Ladder int1"),
    ],
)
def test_the_table_is_what_was_measured(where: tuple[str, str], framework: str, name: str) -> None:
    file, device = where
    records = {record.case: record for record in store.read(ROOT / "results" / file).records}
    expected = []
    for model in MODELS:
        for shape in SHAPES:
            record = records.get(Case(model, framework, shape, device))
            if record is None:
                expected.append("not measured")
            elif record.steady_bytes is None:
                assert record.status is Status.OOM
                expected.append("out of memory")
            else:
                expected.append(str(round(mib(record.steady_bytes))))
    row = f"| {name}, {'CPU' if device == 'cpu' else 'H100'}"
    page = (ROOT / "docs/evidence/measured.md").read_text()
    (line,) = [x for x in page.splitlines() if x.startswith(row)]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == expected


def test_the_readme_s_answers_are_what_the_commands_print(memladder: Command) -> None:
    blocks = re.findall(r"^```\n\$ memladder (.+)\n((?s:.+?))^```", README, re.MULTILINE)
    assert [shlex.split(typed)[0] for typed, _ in blocks] == ["fit", "predict"]
    for typed, shown in blocks:
        arguments = [str(ROOT / x) if x.startswith("tests/") else x for x in shlex.split(typed)]
        done = memladder(*arguments)
        assert done.code == 0, done.err
        assert [line.rstrip() for line in done.out.splitlines()] == shown.splitlines()


def test_the_readme_s_sentence_about_a_cache_in_int8(memladder: Command) -> None:
    asked = ("--gpu", "RTX A6000", "--context", "32768", "--json")
    left = []
    for cache in ("auto", "int8"):
        model = ROOT / "tests/configs/llama-3.3-70b"
        done = memladder("fit", "--model", model, *asked, "--kv-format", cache)
        rows = {row["framework"]: row for row in json.loads(done.out)["rows"]}
        left.append(rows["ladder_fp16_int4"]["left_bytes"] / GIB)
    assert "with {:.1f} GiB left; `--kv-format int8` leaves {:.1f}.".format(*left) in README


@pytest.mark.parametrize(("name", "device"), [("cpu", "cpu"), ("h100", "cuda")])
def test_the_budget_pages_are_what_was_measured(name: str, device: str) -> None:
    records = store.read(ROOT / "results" / f"{name}.json").records
    rows = budget.rows(records, device)
    assert len(rows) == 36 + 6
    assert all(row.holds for row in rows)
    assert budget.to_markdown(rows) in (ROOT / "docs/evidence" / f"budget-{name}.md").read_text()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_of_frameworks_has_tensorrt_as_planned_logged_and_published(
    model: str, shape: Workload
) -> None:
    records = {record.case: record for record in store.read(ROOT / "results/h100.json").records}
    case = Case(model, "tensorrt", shape, "cpu")
    plan = records[case].plan
    assert plan is not None
    logged = published.rerun().values.get(case.id)
    name = {"llama": "LLaMA", "bloom": "BLOOM"}[model]
    row = f"| {name} {shape.batch_size}×{shape.seq_len} | {mib(plan.nbytes):.0f} |"
    page = (ROOT / "docs/reference/frameworks.md").read_text().splitlines()
    (line,) = [line for line in page if line.startswith(row)]
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells[0] == str(logged) if logged else cells[0].startswith("invalid")
    assert cells[1] == str(published.published().values[case.id])
