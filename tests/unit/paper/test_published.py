"""The shipped numbers, held against the paper's figure and the facts known about the rerun."""

import subprocess
import sys

import pytest

from memladder.core.case import Case
from memladder.paper.published import published, rerun
from memladder.paper.rows import MODELS, SHAPES, SYSTEMS

FIGURE_IDS = {
    Case(model, system, shape, "cpu").id
    for model in MODELS
    for system in SYSTEMS
    for shape in SHAPES
}


def test_every_case_of_the_figure_has_a_published_value_and_nothing_else_does():
    assert len(FIGURE_IDS) == 72
    assert set(published().values) == FIGURE_IDS


@pytest.mark.parametrize(
    ("case_id", "value"),
    [
        ("llama_pytorch_1_1", 2660),
        ("llama_tensorrt_1_1", 5140),
        ("llama_ladder_int8_int1_1_1", 534),
        ("bloom_onnxruntime_1_4096", 64718),
        ("bloom_vllm_1_1", 30512),
        ("bloom_ladder_fp16_int4_1_1", 3372),
    ],
)
def test_published_values(case_id, value):
    assert published().values[case_id] == value


def test_published_ladder_is_context_plus_weights():
    # 430 MiB of A100 context, plus parameters times bits: no scales were stored at all.
    parameters = 855_654_400
    for system, bits in (("ladder_fp16_int4", 4), ("ladder_fp8_fp8", 8), ("ladder_int8_int1", 1)):
        weights = parameters * bits / 8 / 2**20
        assert published().values[f"llama_{system}_1_1"] == pytest.approx(430 + weights, abs=3)


def test_kinds_and_devices():
    assert (published().kind, rerun().kind) == ("published", "rerun")
    assert published().device == rerun().device == "NVIDIA A100-80GB-PCIe"
    assert published().invalid == {}


def test_rerun_has_no_value_for_what_measured_something_else():
    assert rerun().values["llama_tensorrt_1_1"] == 2064
    assert rerun().values["bloom_ladder_fp16_int4_1_1"] == 1606
    assert len(rerun().invalid) == 8
    assert rerun().invalid["llama_welder_1_1"] == "ran ONNX Runtime, not Welder"
    assert not set(rerun().invalid) & set(rerun().values)
    assert set(rerun().invalid) | set(rerun().values) <= FIGURE_IDS


def test_values_cannot_be_changed():
    with pytest.raises(TypeError):
        published().values["llama_pytorch_1_1"] = 1


def test_reading_them_needs_neither_numpy_nor_matplotlib():
    program = (
        "import sys; from memladder.paper.published import published; published(); "
        "sys.exit(bool({'numpy', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
