"""The engine's cells on CUDA against their budget: what the bound is, and what breaks it."""

from __future__ import annotations

import dataclasses

import pytest

from memladder import models
from memladder.core.case import Workload
from memladder.core.errors import RecordError
from memladder.core.record import PHASES, LayerFacts, Record
from memladder.core.units import MIB
from memladder.reports import budget
from tests.unit import examples

CONTEXT = 254


def record(steady: int, loading: int) -> Record:
    """LLaMA int4 at 1x1: a context of 254 MiB, then `loading` and `steady` MiB."""
    run = examples.run(steady * MIB, 0)
    sizes = dict.fromkeys(PHASES, loading * MIB) | {
        "import": 0,
        "context": CONTEXT * MIB,
        "steady": steady * MIB,
    }
    phases = tuple(
        dataclasses.replace(run.phases[0], name=name, peak_bytes=size, end_bytes=size)
        for name, size in sizes.items()
    )
    config = models.layer_config("llama")
    return dataclasses.replace(
        examples.record(
            framework="ladder_fp16_int4",
            shape=Workload(1, 1),
            device="cuda:0",
            settings={"weight_format": "int4"},
        ),
        layer=LayerFacts(dict(config.values), config.digest, 855_654_400, 0, 0),
        runs=(dataclasses.replace(run, phases=phases),),
    )


def test_the_bound_is_of_context_and_budget_together() -> None:
    (row,) = budget.rows([record(690, 700)], "cuda")
    assert budget.rows([record(690, 700)]) == ()
    # Weights 420.8 MiB, activations 0.1 MiB: the table of the budget.
    assert row.budget.nbytes / MIB == pytest.approx(420.9, abs=0.1)
    assert row.bound / MIB == pytest.approx(1.03 * (CONTEXT + row.budget.nbytes / MIB) + 8)
    assert row.holds
    text = budget.to_markdown([row]).splitlines()
    assert text[0].startswith("| case | context | weights |")
    assert text[2].startswith("| llama_ladder_fp16_int4_1_1 | 254.0 | 420.8 | 0.1 | 420.9 |")
    assert text[2].endswith("| 690.0 | 15.1 | 700.0 | yes |")


@pytest.mark.parametrize(("steady", "loading"), [(704, 704), (690, 755)])
def test_a_cell_beyond_its_bound_or_with_a_load_peak_does_not_hold(
    steady: int, loading: int
) -> None:
    (row,) = budget.rows([record(steady, loading)], "cuda")
    assert not row.holds
    assert "| NO |" in budget.to_markdown([row])


def test_a_record_without_what_a_budget_needs_is_left_out() -> None:
    good = record(690, 700)
    assert good.layer is not None
    bad = [
        dataclasses.replace(good, settings={}),
        dataclasses.replace(good, settings={"weight_format": "int5"}),
        dataclasses.replace(good, layer=None),
        dataclasses.replace(good, layer=dataclasses.replace(good.layer, config={})),
        dataclasses.replace(
            good, layer=dataclasses.replace(good.layer, config={"hidden_size": "x"})
        ),
        dataclasses.replace(good, runs=(examples.run(690 * MIB, 0),)),
    ]
    told: list[str] = []
    assert budget.rows([*bad, good], "cuda", told.append) == budget.rows([good], "cuda")
    assert len(told) == len(bad)
    assert told[0] == "llama_ladder_fp16_int4_1_1 has no budget: no 'weight_format'"
    with pytest.raises(RecordError, match="int5"):
        budget.rows([bad[1]], "cuda")
