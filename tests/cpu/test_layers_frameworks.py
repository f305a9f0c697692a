"""PyTorch and ONNX Runtime on narrow layers, in this process: right, complete and as declared."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.frameworks._shared.base import Job
from memladder.models import onnx_export, reference, weights
from tests.layers import started

# torch and its exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


def narrow_job(framework: str, model: str, shape: Workload, cache_dir: Path) -> Job:
    case = Case(model, framework, shape, "cpu")
    return Job(case, models.narrow_config(model), cache_dir)


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("framework", ["pytorch", "onnxruntime"])
def test_the_layer_is_computed_right(framework: str, model: str, cache_dir: Path) -> None:
    job = narrow_job(framework, model, Workload(2, 17), cache_dir)
    session, announced = started(job)
    path = weights.ensure(job.config, cache_dir, 0)
    expected = reference.output(job.config, path, job.case.shape, 0)
    found = session.output()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = frameworks.get(framework).tolerance("cpu")
    assert reference.error(found, expected) < tolerance
    session.run()
    assert reference.error(session.output(), found) == 0
    assert announced == (["first run"] if framework == "pytorch" else [])
    assert session.settings()["dtype"] in ("float16", "bfloat16")


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_weights_are_counted_in_what_the_session_holds(model: str, cache_dir: Path) -> None:
    job = narrow_job("onnxruntime", model, Workload(1, 1), cache_dir)
    session, _ = started(job)
    width = {"float16": 2, "float32": 4}[str(session.settings()["matrix_dtype"])]
    norms = sum(
        math.prod(shape)
        for name, shape in models.tensor_shapes(job.config).items()
        if "layernorm" in name
    )
    rest = models.parameters(job.config) - norms
    assert session.categories() == {"weights": 2 * norms + width * rest}


def test_onnxruntime_runs_without_torch(cache_dir: Path) -> None:
    job = narrow_job("onnxruntime", "llama", Workload(1, 1), cache_dir)
    frameworks.get("onnxruntime").prepare(job)
    code = (
        "import sys; from pathlib import Path; from memladder import frameworks, models;"
        "from memladder.core.case import Case, Workload;"
        "from memladder.frameworks._shared.base import Job;"
        "job = Job(Case('llama', 'onnxruntime', Workload(1, 1), 'cpu'),"
        " models.narrow_config('llama'), Path(sys.argv[1]));"
        "s = frameworks.get('onnxruntime').session(job, print);"
        "s.context(); s.weights(); s.compile(); s.run(); s.output();"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def exported(model: str, shape: Workload, cache_dir: Path) -> tuple[Path, onnx.ModelProto]:
    path = onnx_export.ensure(models.narrow_config(model), cache_dir, shape, 0)
    return path, onnx.load(path, load_external_data=False)


def test_the_llama_graph_has_single_operators(cache_dir: Path) -> None:
    _, graph = exported("llama", Workload(2, 17), cache_dir)
    counts = Counter(node.op_type for node in graph.graph.node)
    whole = {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1, "Gemm": 7, "Sigmoid": 1}
    assert {name: counts[name] for name in whole} == whole
    assert not counts.keys() & {"MatMul", "Softmax", "Slice", "Concat", "Neg", "ReduceMean", "Cast"}
    assert {node.domain for node in graph.graph.node} <= {""}


def test_the_bloom_graph_is_the_layer_as_it_is_written(cache_dir: Path) -> None:
    _, graph = exported("bloom", Workload(2, 17), cache_dir)
    counts = Counter(node.op_type for node in graph.graph.node)
    whole = {"LayerNormalization": 2, "Gemm": 4, "MatMul": 2, "Softmax": 1, "Tanh": 1}
    assert {name: counts[name] for name in whole} == whole


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_the_graph_holds_no_weights(model: str, cache_dir: Path) -> None:
    config = models.narrow_config(model)
    path, graph = exported(model, Workload(2, 17), cache_dir)
    data = path.parent / "weights.safetensors"
    inside, outside = {}, {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            outside[tensor.name] = {item.key: item.value for item in tensor.external_data}
        else:
            inside[tensor.name] = tensor
    assert {name.removeprefix("block.") for name in outside} == set(models.tensor_shapes(config))
    assert {place["location"] for place in outside.values()} == {data.name}
    for name, entry in weights.entries(config, 0).items():
        place = outside[f"block.{name}"]
        assert (int(place["offset"]), int(place["length"])) == (entry.offset, entry.length)
    assert sum(len(tensor.raw_data) for tensor in inside.values()) < 20_000
    onnx.checker.check_model(path)


def test_a_graph_is_made_once_for_a_shape(cache_dir: Path) -> None:
    path, _ = exported("llama", Workload(2, 17), cache_dir)
    before = path.stat().st_mtime_ns
    assert exported("llama", Workload(2, 17), cache_dir)[0].stat().st_mtime_ns == before
    assert onnx_export.file_name(Workload(1, 1)) != onnx_export.file_name(Workload(1, 2))
