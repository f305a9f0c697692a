import os

import pytest

from memladder.checks import doctor
from memladder.core import devices
from memladder.core.devices import UNKNOWN, Device, DeviceProcess, Nvml
from memladder.core.errors import DeviceError
from memladder.core.units import GIB, MIB
from memladder.meter import environment
from tests.fake_nvml import FakeNvml, Gpu

A = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
B = "GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6"
C = "GPU-77000000-0000-4106-c12f-20bd9faed9f6"
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
