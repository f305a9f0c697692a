import importlib.util
import sys
from pathlib import Path
from subprocess import run

import pytest

from memladder import frameworks
from memladder.checks import doctor
from memladder.core.case import Case, Workload
from memladder.environments.probe import package_versions
from memladder.meter import environment

CASE = Case("llama", "pytorch", Workload(1, 1), "cpu")


def test_this_machine_is_described() -> None:
    here = environment.describe(CASE, None)
    assert here.same_as(environment.describe(CASE, None))
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.machine.cores >= 1
    assert here.machine.memory_bytes == here.machine.device_memory_bytes > 1 << 28
    assert here.machine.device == here.machine.cpu
    assert (here.machine.driver, here.machine.cuda) == (None, None)
    assert here.machine.kernel


def test_variables_that_matter_are_kept_and_paths_are_not() -> None:
    found = environment.variables(
        {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "PYTORCH_ALLOC_CONF": "a:b",
            "OMP_NUM_THREADS": "2",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:2",
            "MALLOC_ARENA_MAX": "1",
            "TORCHINDUCTOR_CACHE_DIR": "/home/someone/cache",
            "LD_PRELOAD": "./libjemalloc.so",
            "HOME": "/home/someone",
            "HOSTNAME": "box",
            "AWS_SECRET": "x",
            "VLLM_ATTENTION_BACKEND": "FLASHINFER",
        },
        "cpu",
        frameworks.get("pytorch").variables,
    )
    assert found == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:2",
        "LD_PRELOAD": "(a path) libjemalloc.so",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_ALLOC_CONF": "a:b",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": "(a path)",
    }


# A variable of each framework, and one that is another's.
VARIABLES = {
    "pytorch": ("TORCHINDUCTOR_MAX_AUTOTUNE", "GGML_CUDA_FORCE_MMQ"),
    "onnxruntime": ("ORT_DISABLE_ALL", "VLLM_ATTENTION_BACKEND"),
    "tensorrt": ("TRT_MAX_WORKSPACE", "GGML_CUDA_FORCE_MMQ"),
    "vllm": ("VLLM_ATTENTION_BACKEND", "GGML_CUDA_FORCE_MMQ"),
    "vllm_fp16_int4": ("VLLM_USE_V1", "ORT_DISABLE_ALL"),
    "welder": ("TRITON_INTERPRET", "VLLM_USE_V1"),
    "ladder": ("TRITON_CACHE_MANAGER", "ORT_DISABLE_ALL"),
    "ladder_fp16_int4": ("TRITON_INTERPRET", "BNB_CUDA_VERSION_"),
    "llamacpp_int4": ("GGML_CUDA_FORCE_MMQ", "TRITON_INTERPRET"),
    "bitsandbytes_fp16_nf4": ("BNB_LOAD", "TORCHAO_X"),
    "gemlite_fp16_int4": ("GEMLITE_X", "BNB_LOAD"),
    "torchao_fp16_int4": ("TORCHAO_X", "GEMLITE_X"),
    "torchao_fp8_fp8": ("PYTORCH_NO_CUDA_MEMORY_CACHING", "GEMLITE_X"),
}


@pytest.mark.parametrize("key", VARIABLES)
def test_a_frameworks_variables_are_in_the_record_and_count(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, others = VARIABLES[key]
    case, framework = Case("llama", key, Workload(1, 1), "cpu"), frameworks.get(key)
    monkeypatch.delenv(own, raising=False)
    before = environment.describe(case, framework)
    monkeypatch.setenv(others, "1")
    assert environment.describe(case, framework) == before
    monkeypatch.setenv(own, "1")
    after = environment.describe(case, framework)
    assert after.variables == {**before.variables, own: "1"}
    assert not after.same_as(before)
    monkeypatch.setenv(own, "2")
    assert not environment.describe(case, framework).same_as(after)


def test_every_framework_declares_its_variables() -> None:
    for key in frameworks.names():
        assert frameworks.get(key).variables, key


def test_secrets_addresses_and_what_is_no_text_stay_out() -> None:
    found = environment.variables(
        {
            "VLLM_API_KEY": "sk-1",
            "VLLM_TOKEN": "t",
            "VLLM_HOST_IP": "10.0.0.3",
            "VLLM_PORT": "8000",
            "VLLM_S3": "s3://bucket/x",
            "VLLM_VERSION": "1",
            "VLLM_BROKEN": "a\udcffb\x1b[2J\nc",
            "VLLM_PLUGINS": "/opt/a/libone.so.2:/opt/b/libtwo.so",
            "CUDA_HOME": "/usr/local/cuda",
            "CUDA_VERSION": "13.0",
            "CUBLAS_VERSION": "13",
            "PYTHONMALLOC": "malloc",
            "JEMALLOC_CONF": "no",
            "MIMALLOC_VERBOSE": "1",
        },
        "cpu",
        ("VLLM_*",),
    )
    assert found == {
        "JEMALLOC_CONF": "no",
        "MIMALLOC_VERBOSE": "1",
        "PYTHONMALLOC": "malloc",
        "VLLM_BROKEN": "ab c",
        "VLLM_HOST_IP": "(an address)",
        "VLLM_PLUGINS": "(a path) libone.so.2 libtwo.so",
        "VLLM_PORT": "(an address)",
        "VLLM_S3": "(an address)",
    }


def test_module_loading_is_told_as_it_takes_effect() -> None:
    assert environment.variables({}, "cuda:0") == {"CUDA_MODULE_LOADING": "LAZY (default)"}
    chosen = environment.variables({"CUDA_MODULE_LOADING": "EAGER"}, "cuda:0")
    assert chosen == {"CUDA_MODULE_LOADING": "EAGER"}


def test_versions_are_those_installed() -> None:
    found = package_versions(("pytest", "no-such-distribution"))
    assert found == {"pytest": pytest.__version__}


def _a_torch(folder: Path, version: str, cuda: str | None) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


@pytest.mark.parametrize(
    ("version", "cuda", "expected", "said"),
    [
        ("2.13.0+cpu", None, "2.13.0+cpu", "2.13.0+cpu, a CPU build"),
        ("2.11.0+cu130", "13.0", "2.11.0+cu130", "built for CUDA 13.0: on the CPU"),
        # A distribution's own build has no tag.
        ("2.11.0", "12.8", "2.11.0+cu128", "built for CUDA 12.8"),
        ("2.11.0", None, "2.11.0", "2.11.0, a CPU build"),
    ],
)
def test_the_record_and_the_doctor_say_how_torch_was_built(
    version: str,
    cuda: str | None,
    expected: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _a_torch(tmp_path, version, cuda)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    assert package_versions(["torch"]) == {"torch": expected}
    found = doctor._torch()
    assert found.good
    assert said in found.text


def test_measuring_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from memladder.checks import calibration, doctor; "
        "from memladder.meter.outside import runner; "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", program], check=False).returncode == 0
