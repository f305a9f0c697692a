import itertools
import os
from random import Random

import pytest

from memladder.checks import doctor
from memladder.core import devices
from memladder.core.case import Case, Workload
from memladder.core.devices import UNKNOWN, Device, DeviceProcess, Nvml
from memladder.core.errors import DeviceError
from memladder.core.record import Source, dumps, loads_record
from memladder.core.units import GIB, MIB
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.meter.outside.watch import Story
from memladder.reports import table
from tests.fake_nvml import FakeNvml, Gpu
from tests.unit import examples

A = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
B = "GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6"
C = "GPU-77000000-0000-4106-c12f-20bd9faed9f6"
CASE = Case("llama", "pytorch", Workload(1, 1), "cuda:0")
MIG = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"


def names(library: FakeNvml, chosen: str | None) -> list[str]:
    return [device.name for device in Nvml(library).visible(chosen)]


@pytest.fixture
def three() -> FakeNvml:
    return FakeNvml(Gpu(A, "first"), Gpu(B, "second"), Gpu(C, "third"))


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, ["first", "second", "third"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["second"]),
        ("2,0", ["third", "first"]),
        (" 2 , 0 ", ["third", "first"]),
        ("0,-1,1", ["first"]),
        ("0,7,1", ["first"]),
        (C, ["third"]),
        (f"{C},{A}", ["third", "first"]),
        ("1,1", []),
        ("0,1,0", []),
        (f"{A},{A}", []),
        (f"GPU-8932f,{A}", []),
        ("0,,1", ["first"]),
        (",0", []),
        ("1st,2nd", ["second", "third"]),
        ("+1", ["second"]),
        ("all", []),
        (f"{A},1", ["first"]),
        (f"1,{A}", ["second"]),
        (f"{A},{MIG}", ["first"]),
        (f"{C},GPU-none,{A}", ["third"]),
        ("GPU-", []),
        ("9" * 400, []),
        ("GPU-77", ["third"]),
        ("GPU-8932f", ["first"]),
        ("GPU-8932", []),
        (MIG, []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(
    three: FakeNvml, chosen: str | None, seen: list[str]
) -> None:
    assert names(three, chosen) == seen


@pytest.mark.parametrize("seed", range(200))
def test_cuda_visible_devices_is_read_as_torch_reads_it(
    three: FakeNvml, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch parses the variable itself, to count devices without CUDA."""
    import torch.cuda

    random = Random(seed)
    entries = [
        *("0", "1", "2", "3", "-1", "", " 1", "2 ", "+0", "1x", "x1", "99"),
        *(A, B, C, "GPU-8932f", "GPU-8932", "GPU-77", "GPU-", "gpu-77", "MIG-1"),
    ]
    chosen = ",".join(random.choice(entries) for _ in range(random.randrange(1, 5)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    parsed = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        if parsed[0].startswith("MIG-"):
            parsed = []
        else:
            parsed = torch.cuda._transform_uuid_to_ordinals(parsed, [A, B, C])
    expected = list(itertools.takewhile(lambda number: int(number) < 3, parsed))
    found = [int({"first": 0, "second": 1, "third": 2}[name]) for name in names(three, chosen)]
    assert found == expected


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, ["one"]),
        ("0", ["one"]),
        (A, ["one"]),
        ("1,0", ["whole", "one"]),
        (f"{MIG}2", ["two"]),
        (f"{MIG}2,{MIG}1", ["two"]),
        (f"{MIG}", []),
        ("MIG-other", []),
        ("2", []),
    ],
)
def test_a_gpu_in_slices_stands_for_its_first(chosen: str | None, seen: list[str]) -> None:
    slices = [Gpu(f"{MIG}1", "one"), Gpu(f"{MIG}2", "two")]
    library = FakeNvml(Gpu(A, "cut", slices=slices), Gpu(B, "whole"), Gpu(C, "empty", slices=[]))
    assert names(library, chosen) == seen


def test_an_identifier_of_a_slice_may_be_cut() -> None:
    slices = [Gpu("MIG-1234", "one", capability=None), Gpu("MIG-5678", "two")]
    library = FakeNvml(Gpu(A, "cut", slices=slices, capability=(8, 0)))
    (found,) = Nvml(library).visible("MIG-12")
    assert (found.name, found.compute_capability) == ("one", (8, 0))


def test_compute_capability_is_that_of_cudas_device(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(
        Gpu(A, "Tesla T4", capability=(7, 5)), Gpu(B, "H100"), Gpu(C, capability=None)
    )
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(library))
    for chosen, expected in (
        (None, (7, 5)),
        ("0", (7, 5)),
        ("1", (9, 0)),
        (f"{B},{A}", (9, 0)),
        ("2", None),
        ("", None),
        ("1,1", None),
    ):
        if chosen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert devices.compute_capability("cuda:0") == expected, chosen
    assert devices.compute_capability("cpu") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert devices.compute_capability("cuda:1") == (9, 0)


def test_a_device_that_does_not_tell_its_memory_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As GB10's driver answers, and one in a container with a slice: processes are told."""
    gpu = Gpu(A, "NVIDIA GB10", tells_memory=False, processes={10: 500 * MIB, 4242: 43 * MIB})
    library = FakeNvml(gpu)
    found = Device(library, gpu)
    assert (found.memory_bytes, found.used_bytes()) == (None, UNKNOWN)
    assert found.read([10]) == (500 * MIB, UNKNOWN, (DeviceProcess(4242, 43 * MIB),))
    finding, process = list(doctor.gpu_findings(Nvml(library), None))[1:3]
    assert "does not tell its memory" in finding.text
    assert "43.0 MiB" in list(doctor.gpu_findings(Nvml(library), None))[3].text
    assert process.good
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.machine("cuda:0").device_memory_bytes is None
    assert runner.settle(found) == UNKNOWN
    made = examples.record(device="cuda:0", environment=environment.describe(CASE, None))
    assert loads_record(dumps(made)) == made
    assert "NVIDIA GB10, unknown" in table.to_markdown_report([made], [], {})


@pytest.mark.parametrize(
    ("newcomers", "listed"), [((900001,), []), ((900001, 900002), [900001, 900002])]
)
def test_of_several_nameless_newcomers_none_is_taken_for_ours(
    newcomers: tuple[int, ...], listed: list[int]
) -> None:
    others = {7: ("unknown", 1), 5: ("python", 2), **dict.fromkeys(newcomers, ("unknown", 3))}
    story = Story(others=others, before=frozenset({7}))
    told = runner._foreign(story, Source.NVML_DEVICE_DELTA)
    assert [one.pid for one in told] == [5, 7, *listed]
    assert {one.name for one in told if one.pid in newcomers} <= {"unknown, perhaps ours"}
    # Where our own processes are told by their numbers, everybody else is foreign.
    assert len(runner._foreign(story, Source.NVML_PROCESS)) == 2 + len(newcomers)


def test_a_mig_instance_is_found_by_its_identifier() -> None:
    assert names(FakeNvml(Gpu(A), Gpu(MIG, "a slice")), MIG) == ["a slice"]


def test_our_bytes_are_summed_over_the_tree_and_others_are_told_apart() -> None:
    gpu = Gpu(A, used=5 * GIB, processes={10: 500 * MIB, 11: 20 * MIB, 99: GIB})
    reading = Device(FakeNvml(gpu), gpu).read([10, 11, 12])
    assert reading.ours == 520 * MIB
    assert reading.total == 5 * GIB
    assert reading.others == (DeviceProcess(99, GIB),)


def test_bytes_that_are_not_told_are_unknown_and_never_zero() -> None:
    gpu = Gpu(A, used=GIB, processes={10: 500 * MIB, 11: None, 99: None})
    assert Device(FakeNvml(gpu), gpu).read([10, 11]).ours == UNKNOWN
    gpu.processes = {11: None, 10: 500 * MIB}
    assert Device(FakeNvml(gpu), gpu).read([10, 11]).ours == UNKNOWN


def test_a_driver_that_lists_no_processes_still_tells_the_total() -> None:
    gpu = Gpu(A, used=GIB, lists=False)
    assert Device(FakeNvml(gpu), gpu).read([10]) == (0, GIB, ())


def test_a_process_of_another_namespace_has_no_name() -> None:
    assert DeviceProcess(2**22 + 7, 1).name == "unknown"
    assert DeviceProcess(os.getpid(), 1).name != "unknown"


def test_versions_are_read(three: FakeNvml) -> None:
    assert (Nvml(three).driver, Nvml(three).cuda) == ("580.159.04", "13.1")


def test_no_driver_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match="no NVIDIA driver answers: Driver Not Loaded"):
        Nvml(FakeNvml(fails=True))


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(Gpu(A, "first"), Gpu(B, "second"))
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("_two_gpus")
def test_device_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.resolve_device("auto") == "cuda:0"
    assert environment.resolve_device("cuda") == "cuda:0"
    assert environment.resolve_device("cuda:1") == "cuda:1"
    assert environment.resolve_device("cuda:01") == "cuda:1"
    assert environment.resolve_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    chosen = devices.device("cuda:0")
    assert chosen is not None
    assert chosen.name == "second"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.resolve_device("auto") == "cpu"


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", r"'cuda:2' can't be used: .*visible: cuda:0 \(first\), cuda:1 \(second\)"),
        ("gpu", "'gpu' is not auto, cpu, cuda or cuda:N"),
        ("cuda:", "is not auto"),
        ("cuda:x", "is not auto"),
        ("", "is not auto"),
        ("1", "is not auto"),
    ],
)
def test_a_device_that_is_not_here_is_named(name: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        environment.resolve_device(name)


def test_without_a_driver_auto_is_the_cpu_and_cuda_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(FakeNvml(fails=True)))
    assert environment.resolve_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="Driver Not Loaded"):
        environment.resolve_device("cuda")


def test_the_machine_of_a_gpu_has_its_name_memory_and_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = FakeNvml(Gpu(A, "NVIDIA H100 80GB HBM3", total=80 * GIB))
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = environment.machine("cuda:0")
    assert (machine.device, machine.device_memory_bytes) == ("NVIDIA H100 80GB HBM3", 80 * GIB)
    assert (machine.driver, machine.cuda) == ("580.159.04", "13.1")


def test_the_doctor_says_what_is_wrong_with_gpus() -> None:
    library = FakeNvml(Gpu(A, used=60 * GIB, processes={os.getpid(): None}), Gpu(B))
    found = {one.subject: one for one in doctor.gpu_findings(Nvml(library), None)}
    assert not found["cuda:0"].good
    assert "60.0 GiB of 80.0 GiB in use" in found["cuda:0"].text
    assert not found["cuda:0 process"].good
    assert "device deltas" in (found["cuda:0 process"].fix or "")
    assert found["cuda:1"].good
    (_, hidden) = doctor.gpu_findings(Nvml(library), "")
    assert hidden.text == "none of 2 visible"
    assert "CUDA_VISIBLE_DEVICES" in (hidden.fix or "")


def test_every_bad_finding_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(FakeNvml(fails=True)))
    found = doctor.findings()
    assert all(one.fix for one in found if not one.good)
    bad = {one.subject for one in found if not one.good}
    assert {"GPU", "C compiler", "C++ compiler"} <= bad
