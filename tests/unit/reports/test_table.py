"""From records to cells and rows: nothing unverified is drawn, no text bends a table."""

import csv
import io
import json
from dataclasses import fields, replace

import pytest

from memladder.core.case import Case, Workload
from memladder.core.errors import UsageError
from memladder.core.plan import CompilerPlan
from memladder.core.record import (
    Environment,
    LayerFacts,
    Machine,
    PhaseUse,
    Record,
    Run,
    Source,
    Status,
)
from memladder.core.units import GIB, MIB
from memladder.core.verification import Check, StructureCheck, Verification
from memladder.paper.published import published
from memladder.reports import table
from memladder.reports.cells import Cell, cells_from, device_label, ensure_one_machine, notes_from

ONE = Workload(1, 1)
MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    device_memory_bytes=80 * GIB,
    driver="570.86.15",
    cuda="12.8",
    cpu="Some CPU",
    cores=16,
    memory_bytes=128 * GIB,
    os="Linux",
    kernel="6.1",
)
ENVIRONMENT = Environment(MACHINE, "3.11.7", {"torch": "2.13.0"}, {}, None, "0.1.0")
# What a phase has besides its peak plays no part here.
ZEROS = {field.name: 0 for field in fields(PhaseUse)}
LAYER = LayerFacts({}, "0123456789ab", 855_654_400, 1_711_308_800, 0)


def run(steady_mib, peak_mib=None, started="2026-11-20T10:00:00"):
    phases = tuple(
        PhaseUse(**{**ZEROS, "name": name, "peak_bytes": size * MIB})
        for name, size in (("weights", peak_mib or steady_mib), ("steady", steady_mib))
    )
    return Run(started, Source.NVML_PROCESS, phases, 10, 200, 250.4, 0.01, 0, (), {}, ())


def record(framework="pytorch", status=Status.MEASURED, model="llama", shape=ONE, **changes):
    values = {
        "reason": None if status is Status.MEASURED else "because",
        "hint": None,
        "asked_bytes": None,
        "layer": LAYER,
        "settings": {"dtype": "float16"},
        "environment": ENVIRONMENT,
        "runs": (run(2000),) if status is Status.MEASURED else (),
        "plan": None,
        **changes,
    }
    return Record(Case(model, framework, shape, "cuda:0"), status, **values)


def planned(gib, framework="tensorrt", **changes):
    parts, assumed = {"weights": (gib - 1) * GIB}, {"cuda_context": GIB}
    plan = CompilerPlan("NVIDIA A100", "TensorRT-RTX 1.7", parts, assumed)
    return record(
        framework, Status.PLANNED, asked_bytes=gib * GIB, settings={}, plan=plan, **changes
    )


def verification(framework="pytorch", error=1e-3, model="llama", **changes):
    checks = (Check(model, ONE, 1, error, 1e-2),)
    return replace(Verification(framework, "cuda:0", checks, {}, ENVIRONMENT), **changes)


def only_cell(item, *verifications):
    (cell,) = cells_from([item], verifications).values()
    return cell


def test_a_measured_value_counts_when_its_framework_agrees():
    assert only_cell(record(), verification()) == Cell(2000.0, Status.MEASURED)


@pytest.mark.parametrize(
    ("verifications", "note"),
    [
        ([], "unverified"),
        ([verification("onnxruntime")], "unverified"),
        ([verification(model="bloom")], "unverified"),
        ([verification(device="cpu")], "unverified"),
        ([verification(environment=replace(ENVIRONMENT, python="3.12.1"))], "unverified"),
        ([verification(error=0.5)], "wrong output"),
        ([verification(error=float("nan"))], "wrong output"),
        ([verification(), verification(error=0.5)], "wrong output"),
    ],
)
def test_a_measured_value_without_agreement_is_not_drawn(verifications, note):
    assert only_cell(record(), *verifications) == Cell(None, Status.MEASURED, note)


HELD = StructureCheck("llama", ONE, 1, 441_221_202, 441_221_120, ())


@pytest.mark.parametrize(
    ("held", "cell"),
    [
        (HELD, Cell(2000.0, Status.MEASURED)),
        (replace(HELD, layers=2), Cell(None, Status.MEASURED, "wrong output")),
        (replace(HELD, differing=("a",)), Cell(None, Status.MEASURED, "wrong output")),
        (replace(HELD, weight_bytes=1_711_308_800), Cell(None, Status.MEASURED, "wrong output")),
        (replace(HELD, model="bloom"), Cell(None, Status.MEASURED, "unverified")),
    ],
)
def test_what_can_not_be_read_counts_by_what_it_holds(held, cell):
    assert only_cell(record(), verification(checks=(), structure=(held,))) == cell


def test_the_page_says_which_of_the_two_checks_it_was():
    held = replace(HELD, differing=("self_attn.q_proj.weight",))
    page = table.to_markdown_report([record()], [verification(checks=(), structure=(held,))], {})
    assert "keep a layer's output to themselves: what they hold is compared" in page
    assert "1 layer, differing: self" in page
    assert "441221202 bytes of weights where 441221120 are expected" in page
    both = table.to_markdown_report(
        [record()], [verification(), verification(structure=(HELD,))], {}
    )
    assert "| 1.00e-03 |" in both
    assert "1 layer, all shapes right" in both


def test_the_page_says_whose_python_it_was():
    lent = replace(ENVIRONMENT, interpreter="made from 3f2a1b4c")
    page = table.to_markdown_report([record(environment=lent)], [], {})
    assert f"Python: {ENVIRONMENT.python} (made from 3f2a1b4c)" in page


def test_what_was_not_measured_keeps_its_status():
    gib = 24 * GIB
    expected = {
        Status.OOM: Cell(None, Status.OOM, "out of memory"),
        Status.UNAVAILABLE: Cell(None, Status.UNAVAILABLE, "n/a"),
        Status.FAILED: Cell(None, Status.FAILED, "failed"),
        Status.TIMEOUT: Cell(None, Status.TIMEOUT, "timeout"),
        Status.PREDICTED: Cell(None, Status.PREDICTED, "predicted"),
    }
    for status, cell in expected.items():
        assert only_cell(record(status=status), verification()) == cell
    assert only_cell(planned(24)) == Cell(24 * 1024.0, Status.PLANNED, "planned")
    oom = record(status=Status.OOM, asked_bytes=gib)
    assert only_cell(oom).note == "out of memory, asked for 24.0 GiB"


def test_a_plan_may_come_from_another_machine_and_says_whose_it_is():
    cpu = replace(MACHINE, device="Some CPU", driver=None, cuda=None)
    elsewhere = planned(3, environment=replace(ENVIRONMENT, machine=cpu))
    records = [elsewhere, record()]
    cells = cells_from(records, [verification()])
    assert cells["llama", "tensorrt", ONE] == Cell(3 * 1024.0, Status.PLANNED, "planned")
    assert device_label(records) == "NVIDIA H100 80GB HBM3, driver 570.86.15"
    assert notes_from(records)[-1] == (
        "TensorRT is planned by TensorRT-RTX 1.7 for NVIDIA A100, and did not run; "
        "1024.0 MiB of CUDA context are assumed in it."
    )
    assert [row.device for row in table.rows(records, published().values)] == [
        "NVIDIA A100",
        "NVIDIA H100 80GB HBM3",
    ]
    page = table.to_markdown_report(records, [verification()], {})
    assert "| weights 2048.0 | CUDA context 1024.0 | 3072.0 |" in page


def test_hosts_of_a_gpu_may_differ_in_cores_and_are_told():
    other = replace(MACHINE, cores=32, memory_bytes=256 * GIB)
    records = [record(), record("vllm", environment=replace(ENVIRONMENT, machine=other))]
    ensure_one_machine(records)
    page = table.to_markdown_report(records, [], {})
    assert "- Processor: Some CPU, 16 cores, 128.0 GiB and 32 cores, 256.0 GiB" in page
    on_cpu = [
        replace(one, case=replace(one.case, device="cpu"), environment=one.environment)
        for one in records
    ]
    with pytest.raises(UsageError, match="cores 16 and 32"):
        ensure_one_machine(on_cpu)


def test_builds_of_one_kernel_are_told_and_versions_refused():
    def of(kernel):
        machine = replace(MACHINE, kernel=kernel)
        return record("vllm", environment=replace(ENVIRONMENT, machine=machine))

    build = [of("6.1.0-18"), of("6.1.0-13")]
    ensure_one_machine(build)
    page = table.to_markdown_report(build, [], {})
    assert "- System: Linux, 6.1.0-13 and 6.1.0-18" in page
    with pytest.raises(UsageError, match=r"kernel '6\.1\.0-18' and '6\.1\.2-18'"):
        ensure_one_machine([of("6.1.0-18"), of("6.1.2-18")])


def test_records_of_two_machines_are_refused():
    other = replace(MACHINE, device="NVIDIA A100-80GB-PCIe", driver="535.1")
    records = [record(), record("vllm", environment=replace(ENVIRONMENT, machine=other))]
    for function in (ensure_one_machine, device_label, lambda r: cells_from(r, [])):
        with pytest.raises(UsageError) as caught:
            function(records)
        message = str(caught.value)
        for part in (
            "NVIDIA H100 80GB HBM3",
            "NVIDIA A100-80GB-PCIe",
            "driver '570.86.15' and '535.1'",
            "llama_vllm_1_1",
        ):
            assert part in message
        assert "\n" not in message
    ensure_one_machine(records[:1])
    ensure_one_machine([])


def test_a_case_twice_and_two_layers_of_a_model_are_refused():
    with pytest.raises(UsageError, match="two records of llama_pytorch_1_1"):
        cells_from([record(), record()], [])
    other = replace(LAYER, digest="ba9876543210")
    with pytest.raises(UsageError, match="different configurations of llama"):
        cells_from([record(), record("vllm", layer=other)], [])
    assert len(cells_from([record(), record(model="bloom", layer=other)], [])) == 2


def test_notes_say_how_and_when():
    records = [
        record(runs=(run(2000), run(2100, started="2026-11-21T01:00:00"), run(1900))),
        record("vllm", Status.FAILED),
    ]
    how, when = notes_from(records)
    assert "NVML, per process" in how
    assert "median of 3 processes" in how
    assert (
        when
        == "Measured 2026-11-20 to 2026-11-21 with memladder 0.1.0, 250 polls a second or more."
    )
    assert notes_from(records[1:]) == ("Nothing was measured.",)
    assert device_label(records) == "NVIDIA H100 80GB HBM3, driver 570.86.15"


def test_rows():
    measured = record(runs=(run(2000, 4000), run(2100), run(1900)))
    failed = record("vllm", Status.OOM, shape=Workload(1, 4096), asked_bytes=3 * MIB // 2)
    first, second = table.rows([measured, failed], published().values)
    assert first == table.Row(
        id="llama_pytorch_1_1",
        model="llama",
        framework="pytorch",
        batch_size=1,
        seq_len=1,
        device="NVIDIA H100 80GB HBM3",
        status="measured",
        steady_mib=2000.0,
        peak_mib=4000.0,
        over_import_mib=None,
        spread_percent=10.0,
        asked_mib=None,
        published_mib=2660,
        reason=None,
    )
    assert (second.steady_mib, second.peak_mib, second.asked_mib) == (None, None, 1.5)
    assert (second.published_mib, second.reason) == (4866, "because")
    assert [row.published_mib for row in table.rows([measured], {})] == [None]


def _imported(imported_mib, steady_mib, source=Source.PSS):
    made = run(steady_mib)
    base = replace(made.phases[0], name="import", peak_bytes=1, end_bytes=imported_mib * MIB)
    return replace(made, source=source, phases=(base, *made.phases[1:]))


def test_growth_over_import_stands_beside_the_total_on_the_cpu():
    runs = (_imported(190, 400), _imported(200, 500), _imported(210, 430))
    packages = {"torch": "2.13.0+cpu"}
    measured = record(runs=runs, environment=replace(ENVIRONMENT, packages=packages))
    assert (measured.import_bytes, measured.over_import_bytes) == (200 * MIB, 220 * MIB)
    assert table.rows([measured], {})[0].over_import_mib == 220.0
    # Of a device's bytes libraries of the host are no part.
    on_gpu = replace(measured, runs=(_imported(190, 400, Source.NVML_PROCESS),))
    assert (on_gpu.import_bytes, on_gpu.over_import_bytes) == (None, None)
    assert not any("import" in note for note in notes_from([on_gpu]))


def test_the_figure_says_what_libraries_take_and_of_which_build():
    def made(imported, version):
        environment = replace(ENVIRONMENT, packages={"torch": version} if version else {})
        return record(runs=(_imported(imported, 2000),), environment=environment)

    note = "Of each bar imported libraries take "
    assert f"{note}190.0 MiB (torch 2.13.0+cpu)." in notes_from([made(190, "2.13.0+cpu")])
    gpu = made(725, "2.11.0+cu130")
    assert f"{note}725.0 MiB (torch 2.11.0+cu130, a CUDA build, which takes more)." in notes_from(
        [gpu]
    )
    assert f"{note}45.0 MiB to 190.0 MiB (torch 2.13.0+cpu)." in notes_from(
        [made(190, "2.13.0+cpu"), made(45, None)]
    )


def test_csv_round_trip():
    rows = table.rows(
        [record(), record("vllm", Status.FAILED, reason='a, "b"\r\nc')], published().values
    )
    first, second = csv.DictReader(io.StringIO(table.to_csv(rows)))
    assert tuple(first) == table.COLUMNS
    assert (first["steady_mib"], first["published_mib"], first["reason"]) == ("2000.0", "2660", "")
    assert (second["steady_mib"], second["reason"]) == ("", 'a, "b" c')


@pytest.mark.parametrize("reason", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n-1"])
def test_csv_cells_are_no_formulas(reason):
    text = table.to_csv(table.rows([record(status=Status.FAILED, reason=reason)], {}))
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["reason"] == f"'{reason.strip()}"


def test_json_round_trip():
    rows = table.rows([record(), record("vllm", Status.FAILED)], {})
    first, second = json.loads(table.to_json(rows))
    assert tuple(first) == table.COLUMNS
    assert first["steady_mib"] == 2000.0
    assert second["steady_mib"] is None
    assert [table.Row(**line) for line in (first, second)] == list(rows)


def test_markdown_is_one_line_a_row_and_shows_text_as_it_is():
    reason = "a | b\n`c` <class 'X'> \\ __init__ *x* \x1b[31m"
    text = table.to_markdown(table.rows([record(status=Status.FAILED, reason=reason)], {}))
    head, rule, line = text.splitlines()
    assert head == f"| {' | '.join(table.COLUMNS)} |"
    assert rule.split(" | ")[table.COLUMNS.index("steady_mib")] == "---:"
    assert rule.split(" | ")[table.COLUMNS.index("status")] == "---"
    assert line.startswith("| llama_pytorch_1_1 | llama |")
    assert line.endswith("| a \\| b \\`c\\` &lt;class 'X'> \\\\ \\_\\_init\\_\\_ \\*x\\* \\[31m |")


def test_report_page():
    records = [
        record(settings={"dtype": "float16", "mode": "default"}),
        record(shape=Workload(32, 1), settings={"dtype": "float16", "mode": "max"}),
        record("vllm", Status.UNAVAILABLE, settings={}),
    ]
    page = table.to_markdown_report(
        records, [verification(error=2.5e-4), verification("x", 0.5)], {}
    )
    for part in (
        "- Device: NVIDIA H100 80GB HBM3, 80.0 GiB",
        "- Driver: 570.86.15",
        "- Packages: torch 2.13.0",
        "| llama_pytorch_1_1 |",
        "| vllm |",
        "| pytorch | NVIDIA H100 80GB HBM3 | llama | 1x1 | 1 | 2.50e-04 | 1.00e-02 | yes |",
        "| 5.00e-01 | 1.00e-02 | NO |",
        "| pytorch | mode | default, max |",
    ):
        assert part in page
    assert "*timeout*" not in page
    assert "llama_vllm_1_1" not in page
    assert table.to_markdown_report([], [], {}).count("No ") == 3


def test_report_page_of_two_machines_is_refused():
    other = replace(ENVIRONMENT, machine=replace(MACHINE, os="Other"))
    with pytest.raises(UsageError, match="os 'Linux' and 'Other'"):
        table.to_markdown_report([record(), record("vllm", environment=other)], [], {})
