import json
from pathlib import Path

import pytest

from memladder.core import serial
from memladder.core.case import Case, Workload
from memladder.core.errors import UsageError
from memladder.paper.rows import MODELS, SHAPES, SYSTEMS


def test_case_ids_are_the_artifacts_own_keys() -> None:
    data = Path(__file__).parents[3] / "src/memladder/paper/data/figure11_published_a100.json"
    published = json.loads(data.read_text())["values"]
    ids = [
        Case(model, system, shape, "cpu").id
        for model in MODELS
        for system in SYSTEMS
        for shape in SHAPES
    ]
    assert len(ids) == len(set(ids)) == 2 * 12 * 3
    assert set(ids) == set(published)


@pytest.mark.parametrize(
    ("batch_size", "seq_len"),
    [(0, 1), (1, 0), (-1, 1), (True, 1), (1.5, 1), (65_537, 1), (1, 1_048_577), (1024, 1_048_576)],
)
def test_senseless_shapes_are_refused(batch_size: int, seq_len: int) -> None:
    with pytest.raises(UsageError, match=r"batch_size|seq_len"):
        Workload(batch_size, seq_len)


@pytest.mark.parametrize("text", ["", "1", "x", "1x", "1x1x1", "-1x1", "1.0x2", "a x b", "9" * 30])
def test_shapes_that_are_no_shapes_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="BATCHxSEQ"):
        Workload.parse(text)


@pytest.mark.parametrize("text", ["32x1", " 32 x 1 ", "32X1", "32×1"])
def test_shapes_are_read_as_people_write_them(text: str) -> None:
    assert Workload.parse(text) == Workload(32, 1)


@pytest.mark.parametrize("text", ["1x1+4096", " 1 x 1 + 4096 ", "1×1+4096"])
def test_a_past_is_a_third_part(text: str) -> None:
    assert Workload.parse(text) == Workload(1, 1, 4096)
    assert str(Workload(1, 1, 4096)) == "1x1+4096"
    assert str(Workload(1, 4096)) == "1x4096"


@pytest.mark.parametrize("text", ["1x1+", "1x1+-1", "1x1+4k", "1+1x1", "1x1+1+1"])
def test_pasts_that_are_none_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="BATCHxSEQ\\+PAST"):
        Workload.parse(text)


@pytest.mark.parametrize("past", [-1, True, 1.0, 16_777_217, 1 << 70])
def test_senseless_pasts_are_refused(past: int) -> None:
    with pytest.raises(UsageError, match="past"):
        Workload(1, 1, past)


def test_a_cache_of_too_many_tokens_is_refused() -> None:
    assert Workload(1024, 1, 1_048_575).cached_tokens == 1 << 30
    with pytest.raises(UsageError, match="in the cache"):
        Workload(1024, 1, 1_048_576)


def test_a_case_says_its_past_and_its_scope() -> None:
    def name(layers: int | str, past: int = 0) -> str:
        return Case("llama", "vllm", Workload(1, 1, past), "cpu", layers).id

    assert name(1) == "llama_vllm_1_1"
    assert name(1, 8192) == "llama_vllm_1_1_p8192"
    assert name("all", 8192) == "llama_vllm_1_1_p8192_all"
    assert name(4) == "llama_vllm_1_1_l4"


@pytest.mark.parametrize("layers", [0, -1, True, 1.0, "ALL", "", "1", 4097])
def test_scopes_that_are_none_are_refused(layers: int | str) -> None:
    with pytest.raises(UsageError, match="layers"):
        Case("llama", "vllm", Workload(1, 1), "cpu", layers)


def test_cases_from_before_pasts_and_scopes_are_read() -> None:
    old = {
        "model": "llama",
        "framework": "vllm",
        "shape": {"batch_size": 1, "seq_len": 4096},
        "device": "cpu",
    }
    case = Case("llama", "vllm", Workload(1, 4096), "cpu")
    assert serial.from_json(Case, old) == case
    assert serial.from_json(Case, serial.to_json(case)) == case


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:-1", "cpu:0", "../x"])
def test_a_case_names_one_device(device: str) -> None:
    with pytest.raises(UsageError, match="device"):
        Case("llama", "pytorch", Workload(1, 1), device)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "a__b", "_a"])
def test_a_case_id_can_only_be_a_plain_file_name(name: str) -> None:
    with pytest.raises(UsageError, match="lower-case"):
        Case(name, "pytorch", Workload(1, 1), "cpu")
