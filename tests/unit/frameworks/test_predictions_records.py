"""Predictions against the H100's records: the rules were found on these cells, and must hold."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from memladder.predictor import api, evidence
from memladder.sweeps import store

_STORE = Path(__file__).parents[3] / "results" / "h100.json"
# Largest error in thousandths, by the beginning of a key; what is not named must be within 3.
_BOUNDS = {"gemlite": 10, "torchao_fp8": 18, "vllm_fp16": 14, "vllm": 4, "ladder_int8": 8}


def _cells() -> list[Any]:
    records = json.loads(_STORE.read_text())["records"]
    return [record for record in records if record["runs"] or record["plan"]]


def _held(record: Any) -> int:
    if record["plan"]:
        return int(record["asked_bytes"])
    phases = {phase["name"]: phase for phase in record["runs"][0]["phases"]}
    return int(phases["steady"]["peak_bytes"])


def _predicted(record: Any) -> Any:
    case = record["case"]
    shape = case["shape"]
    return api.predict(
        case["model"],
        case["framework"],
        batch_size=shape["batch_size"],
        seq_len=shape["seq_len"],
        gpu="H100",
    )


@pytest.mark.parametrize("key", sorted({cell["case"]["framework"] for cell in _cells()}))
def test_totals(key: str) -> None:
    bound = next((b for name, b in _BOUNDS.items() if key.startswith(name)), 3) / 1000
    for record in _cells():
        if record["case"]["framework"] == key:
            found, held = _predicted(record), _held(record)
            assert abs(found.total_bytes / held - 1) <= bound, (found.id, found.total_bytes, held)


def test_median() -> None:
    errors = [abs(_predicted(r).total_bytes / _held(r) - 1) for r in _cells()]
    assert len(errors) == 95
    assert statistics.median(errors) <= 0.0005
    assert sorted(errors)[int(0.95 * len(errors))] <= 0.01


@pytest.mark.parametrize("key", ["pytorch", "bitsandbytes_fp16_nf4", "torchao_fp16_int4"])
def test_what_the_allocator_holds(key: str) -> None:
    """Weights and what torch keeps between passes, to a page."""
    for record in _cells():
        if record["case"]["framework"] != key:
            continue
        told = record["runs"][0]["categories"]
        ledger = _predicted(record).ledger
        weights = ledger.nbytes("weights") + ledger.nbytes("scales")
        assert abs(weights - told["weights"]) <= 1 << 16
        inside = ("context", "modules")
        reserved = sum(e.nbytes for e in ledger.entries if e.category not in inside)
        assert abs(reserved - told["allocator_reserved"]) <= 3 << 20


def test_processes_on_a_cpu() -> None:
    """Within the goal: a median of 2 %, 5 % at most."""
    records = store.read(_STORE.with_name("cpu.json")).records
    found = evidence.score(evidence.compare(records))
    assert found is not None
    assert found.cells == 53
    assert found.median <= 0.006
    assert found.largest <= 0.035
    assert found.within == 53
