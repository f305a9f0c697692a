import sys
from subprocess import run

import pytest

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
        },
        "cpu",
    )
    assert found == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:2",
        "LD_PRELOAD": "(a path)",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_ALLOC_CONF": "a:b",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": "(a path)",
    }


def test_module_loading_is_told_as_it_takes_effect() -> None:
    assert environment.variables({}, "cuda:0") == {"CUDA_MODULE_LOADING": "LAZY (default)"}
    chosen = environment.variables({"CUDA_MODULE_LOADING": "EAGER"}, "cuda:0")
    assert chosen == {"CUDA_MODULE_LOADING": "EAGER"}


def test_versions_are_those_installed() -> None:
    found = package_versions(("pytest", "no-such-distribution"))
    assert found == {"pytest": pytest.__version__}


def test_measuring_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from memladder.checks import calibration, doctor; "
        "from memladder.meter.outside import runner; "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", program], check=False).returncode == 0
