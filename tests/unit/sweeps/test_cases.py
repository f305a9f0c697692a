import pytest

from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.core.record import Status
from memladder.paper.rows import MODELS, SHAPES, SYSTEMS
from memladder.sweeps import cases


def test_the_figure_has_72_cells() -> None:
    selected = cases.select(MODELS, SYSTEMS, SHAPES, "cpu")
    assert len(selected) == 72
    assert selected[0].id == "llama_pytorch_1_1"


def test_the_smallest_shape_comes_first() -> None:
    selected = cases.select(["llama"], ["pytorch"], cases.parse_shapes("1x4096,1x1,32x1"), "cpu")
    assert [str(case.shape) for case in selected] == ["1x1", "32x1", "1x4096"]


def test_names_and_shapes_are_read_once_each() -> None:
    assert cases.parse_models("bloom, llama,bloom") == ("bloom", "llama")
    assert cases.parse_shapes("1x1,1X1") == (Workload(1, 1),)


@pytest.mark.parametrize("text", ["gpt5", "llama,", "", "llama;bloom"])
def test_unknown_models_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="model"):
        cases.parse_models(text)


def test_unknown_frameworks_are_named_with_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"'tensorflow'; known: pytorch, onnxruntime, tensorrt"):
        cases.parse_frameworks("tensorflow", first=SYSTEMS)


def test_every_system_of_the_figure_can_be_asked_about() -> None:
    for system in SYSTEMS:
        found = cases.availability(system, "cpu")
        assert found.available or found.reason
    assert cases.availability("welder", "cpu").available


def test_statuses_to_try_again() -> None:
    assert cases.parse_statuses(None) == frozenset()
    assert cases.parse_statuses("oom, failed") == {Status.OOM, Status.FAILED}
    with pytest.raises(UsageError, match="unknown status 'full'; known: measured, planned, "):
        cases.parse_statuses("oom,full")
