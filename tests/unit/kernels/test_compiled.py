"""The Triton kernels compiled for GPUs that are not here: no spills, and the right tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia")

# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, table of technical
# specifications per compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10}

# Processes for each of them.
PARTS = 2
# Some 130 compilations, which two cores share.
pytestmark = pytest.mark.timeout(900)

Kernels = dict[str, dict[str, Any]]


def compiled(capability: int, part: int, cache: Path) -> Kernels:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compiled.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(part), str(PARTS)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {kernel["name"]: kernel for kernel in found}


@pytest.fixture(
    scope="module",
    params=[pytest.param(80, id="A100", marks=pytest.mark.slow), pytest.param(90, id="H100")],
)
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Kernels]:
    cache = tmp_path_factory.mktemp("triton")
    found: Kernels = {}
    with ThreadPoolExecutor(PARTS) as pool:
        for made in pool.map(lambda part: compiled(request.param, part, cache), range(PARTS)):
            found |= made
    return request.param, found


def test_no_kernel_needs_a_stack_or_more_shared_memory_than_there_is(
    kernels: tuple[int, Kernels],
) -> None:
    # Local memory for every thread that can be resident is the process's largest avoidable part.
    capability, found = kernels
    assert len(found) > 30
    for name, kernel in found.items():
        assert (kernel["stack"], kernel["local"]) == (0, 0), name
        assert kernel["shared"] <= SHARED[capability], name


@pytest.mark.parametrize("rows", [32, 512])
def test_products_run_on_the_tensor_cores_of_their_operands(
    kernels: tuple[int, Kernels], rows: int
) -> None:
    capability, found = kernels
    wanted = {
        80: {"fp16 fp16": "HMMA", "int4 fp16": "HMMA", "nf4 fp16": "HMMA", "int1 int8": "IMMA"},
        90: {
            "fp16 fp16": "HGMMA",
            "int4 fp16": "HGMMA",
            "nf4 fp16": "HGMMA",
            "mxfp8 mxfp8": "HGMMA",
            "fp8 fp8": "QGMMA",
            "int1 int8": "IGMMA",
        },
    }[capability]
    for pair, instruction in wanted.items():
        assert found[f"matmul {pair} {rows}"]["tensor"] == [instruction], pair


@pytest.mark.parametrize("kernels", [90], ids=["H100"], indirect=True)
@pytest.mark.parametrize("shape", ["matmul", "biased", "gated"])
def test_products_are_waited_for_where_it_is_due(kernels: tuple[int, Kernels], shape: str) -> None:
    # From registers, which the next step overwrites: all of them. From shared memory: all but one
    # step's, or each product stands alone.
    _, found = kernels
    for pair in ("int4 fp16", "nf4 fp16", "mxfp8 mxfp8", "int1 int8"):
        assert found[f"{shape} {pair} 512"]["waits"] == [0], pair
    for pair in ("fp16 fp16", "fp8 fp8"):
        assert found[f"{shape} {pair} 512"]["waits"] == [0, 1], pair
