"""Frameworks from outside: the list of them, availability, and what counts as out of memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from memladder import frameworks
from memladder.core.case import Case, Workload
from memladder.core.errors import UsageError
from memladder.core.units import GIB, MIB
from memladder.frameworks import onnxruntime, pytorch
from memladder.frameworks._shared.base import OutOfMemoryError
from memladder.frameworks._shared.torch_common import memory_errors


def test_the_folder_is_the_list_of_frameworks() -> None:
    assert {"onnxruntime", "pytorch"} <= set(frameworks.names())
    files = {path.stem for path in Path(frameworks.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= set(frameworks.names())
    for name in frameworks.names():
        framework = frameworks.get(name)
        assert framework.title
        assert framework.packages
    with pytest.raises(UsageError, match="unknown framework 'tvm'; known: "):
        frameworks.get("tvm")


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_a_missing_library_is_a_reason_with_a_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = frameworks.get(name).availability("cpu")
    assert not found.available
    assert found.reason is not None
    assert "not installed" in found.reason
    assert found.install == f"pip install 'memladder[{name}]'"


def test_a_cpu_build_of_torch_can_not_run_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(pytorch.importlib.metadata, "version", lambda _: "2.13.0")
    (tmp_path / "version.py").write_text("cuda: str | None = None\n")
    found = pytorch.FRAMEWORK.availability("cuda:0")
    assert (found.available, found.reason) == (False, "torch 2.13.0 is built without CUDA")
    assert pytorch.FRAMEWORK.availability("cpu").available
    (tmp_path / "version.py").write_text("cuda = '13.0'\n")
    assert pytorch.FRAMEWORK.availability("cuda:0").available


def test_onnxruntime_on_cuda_needs_the_gpu_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(onnxruntime, "_version", lambda _: "1.30.0")
    found = onnxruntime.FRAMEWORK.availability("cuda:0")
    assert not found.available
    assert found.install == "pip install 'memladder[onnxruntime-gpu]'"
    assert onnxruntime.FRAMEWORK.availability("cpu").available
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    assert onnxruntime.FRAMEWORK.availability("cuda:0").available


def test_inductor_compiles_anew_and_alone() -> None:
    on_cpu, on_cuda = (
        pytorch.FRAMEWORK.environment(Case("llama", "pytorch", Workload(1, 1), device))
        for device in ("cpu", "cuda:0")
    )
    assert on_cpu["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"
    assert on_cuda["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"
    assert on_cuda["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert on_cuda["CUDA_MODULE_LOADING"] == "LAZY"
    assert on_cuda["PYTORCH_ALLOC_CONF"] == on_cuda["PYTORCH_CUDA_ALLOC_CONF"]


TORCH_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.06 GiB is free."
)
TORCH_CPU = (
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
ORT_ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "Softmax node. Status Message: bfc_arena.cc:359 void* onnxruntime::BFCArena::"
    "AllocateRawInternal() Failed to allocate memory for requested buffer of size 7516192768"
)
ORT_CUDA = "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"


@pytest.mark.parametrize(
    ("errors", "text", "asked"),
    [
        (memory_errors, TORCH_CUDA, 2 * GIB),
        (memory_errors, TORCH_CUDA.replace("2.00 GiB", "512.00 MiB"), 512 * MIB),
        (memory_errors, TORCH_CPU, 8 * GIB),
        (memory_errors, "CUDA error: out of memory", None),
        (onnxruntime._memory_errors, ORT_ARENA, 7 * GIB),
        (onnxruntime._memory_errors, ORT_CUDA, None),
        (onnxruntime._memory_errors, "std::bad_alloc", None),
    ],
)
def test_failed_allocations_are_told_from_failures(errors, text: str, asked: int | None) -> None:
    with pytest.raises(OutOfMemoryError) as caught, errors():
        raise RuntimeError(text)
    assert caught.value.asked_bytes == asked
    with pytest.raises(RuntimeError, match="shapes disagree"), errors():
        raise RuntimeError("shapes disagree")
    with pytest.raises(OutOfMemoryError), errors():
        raise MemoryError
