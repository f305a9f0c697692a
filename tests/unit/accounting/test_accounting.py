"""Ledgers of measured records: they close, and two of them say what changed."""

from dataclasses import replace
from pathlib import Path

import pytest

from memladder.accounting import diff, split
from memladder.core.errors import RecordError
from memladder.core.ledger import Known
from memladder.core.record import Record
from memladder.core.units import MIB
from memladder.frameworks._shared.torch_common import AllocatorReadings
from memladder.predictor import evidence
from memladder.sweeps import store

_RESULTS = Path(__file__).parents[3] / "results"
_CUDA = store.read(_RESULTS / "h100.json").records
_CPU = store.read(_RESULTS / "cpu.json").records
_CLOSE = ("ladder", "welder", "pytorch")


def _record(case: str) -> Record:
    return next(record for record in _CUDA if record.case.id == case)


@pytest.mark.parametrize("record", [r for r in _CUDA if r.runs], ids=lambda r: r.case.id)
def test_every_gpu_cell_closes_within_its_bound(record: Record) -> None:
    """4 MiB or 0.5 % for ladder and pytorch, 2 % for the others; NVML moves in 2 MiB."""
    ledger = split.ledger(record)
    assert ledger.total_bytes == record.steady_bytes
    left = abs(ledger.nbytes("residual"))
    if record.case.framework.split("_")[0] in _CLOSE:
        assert left <= max(4 * MIB, 0.005 * ledger.total_bytes)
    else:
        assert left <= 0.02 * ledger.total_bytes


@pytest.mark.parametrize("record", [r for r in _CPU if r.runs][::7], ids=lambda r: r.case.id)
def test_a_cpu_s_ledger_closes_within_what_shared_pages_move(record: Record) -> None:
    ledger = split.ledger(record)
    assert ledger.total_bytes == record.steady_bytes
    assert ledger.nbytes("libraries") > 0
    assert abs(ledger.nbytes("residual")) <= max(60 * MIB, 0.03 * ledger.total_bytes)


def test_the_allocator_s_own_peak_comes_before_the_rules() -> None:
    record = _record("llama_pytorch_1_4096")
    (run,) = record.runs
    told = {**run.categories, "allocator_steady_peak": run.categories["allocator_allocated_peak"]}
    found = split.ledger(replace(record, runs=(replace(run, categories=told),)))
    entry = found.get("activations")
    assert entry is not None
    assert entry.known is Known.DIFFERENCE
    # 2306.03 MiB at most, of which weights, buffers, states and cuBLAS hold 1794.03.
    assert entry.nbytes == 512 * MIB
    assert abs(found.nbytes("residual")) <= 4 * MIB


def test_peaks_of_the_load_are_kept_beside_those_while_steady(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    readings = iter([(900, 1000), (500, 600)])

    def stats() -> dict[str, int]:
        allocated, reserved = next(readings)
        return {
            "allocated_bytes.all.current": 400,
            "allocated_bytes.all.peak": allocated,
            "reserved_bytes.all.current": 600,
            "reserved_bytes.all.peak": reserved,
        }

    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    found = AllocatorReadings()
    found.begin_steady()
    told = found.categories()
    assert (told["allocator_allocated_peak"], told["allocator_reserved_peak"]) == (900, 1000)
    assert told["allocator_steady_peak"] == 500
    assert told["allocator_reserved"] == 600


def test_a_planned_record_has_no_ledger() -> None:
    with pytest.raises(RecordError, match="planned has no measured bytes"):
        split.ledger(_record("llama_tensorrt_1_1"))


def test_written_out_scores_are_named() -> None:
    found = diff.diff(_record("bloom_pytorch_1_1"), _record("bloom_pytorch_1_4096"))
    assert found.total.nbytes == 4182 * MIB
    assert found.sentence.startswith("+4,182 MiB: +3,920 MiB activations: scores materialised;")
    assert found.told == ("workload: 1x1 -> 1x4096",)


def test_cublas_is_named_when_it_comes_in() -> None:
    one = _record("llama_bitsandbytes_fp16_nf4_1_1")
    found = diff.diff(one, _record("llama_bitsandbytes_fp16_nf4_32_1"))
    assert "+32 MiB workspace: cuBLAS came in" in found.sentence
    assert "+66 MiB modules: kernels of cuBLAS came in" in found.sentence


def test_nothing_changed() -> None:
    one = _record("llama_pytorch_1_1")
    assert diff.diff(one, one).sentence == "+0 MiB: nothing changed by more than 2 MiB"


def test_sealed_predictions_come_back(tmp_path: Path) -> None:
    cells = [cell for cell in evidence.compare(_CUDA[:6]) if cell.prediction]
    predictions = [cell.prediction for cell in cells if cell.prediction]
    path = tmp_path / "sealed.json"
    digest = evidence.seal(path, predictions)
    assert evidence.sealed(path) == (digest, predictions)
    again = evidence.compare(_CUDA[:7], predictions)
    assert [cell.prediction for cell in again[:6]] == predictions
    assert again[6].reason == "not among the sealed predictions"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"predictions": [{}]}', '{"predictions": 3}'])
def test_what_was_not_sealed_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecordError, match="no sealed predictions"):
        evidence.sealed(tmp_path / "x.json")


def test_the_score_of_known_errors() -> None:
    found = evidence.score(evidence.compare(_CUDA))
    assert found is not None
    assert found.cells == 89
    assert found.median <= 0.0005
    assert found.largest <= 0.02
