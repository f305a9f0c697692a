import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memladder.core.errors import RecordError
from memladder.core.plan import CompilerPlan
from memladder.core.record import Status, dumps, loads_record
from memladder.core.units import MIB
from tests.unit import examples


def test_a_record_survives_its_file() -> None:
    record = examples.record(steady=(2000 * MIB, 2010 * MIB))
    assert loads_record(dumps(record)) == record


def test_a_record_from_before_environments_is_read() -> None:
    data = json.loads(dumps(examples.record()))
    del data["environment"]["interpreter"]
    assert loads_record(json.dumps(data)).environment.interpreter is None


def test_steady_is_the_median_and_peak_the_largest() -> None:
    record = examples.record(steady=(1000, 1010, 1100))
    assert record.steady_bytes == 1010
    assert record.peak_bytes == 1100 + 100 * MIB
    assert record.spread == pytest.approx(100 / 1010)


_WITH_BYTES = (Status.MEASURED, Status.PLANNED)


@pytest.mark.parametrize("status", [s for s in Status if s not in _WITH_BYTES])
def test_only_measured_carries_bytes(status: Status) -> None:
    record = examples.record(status=status, reason="it broke")
    assert record.steady_bytes is None
    assert record.peak_bytes is None
    with pytest.raises(RecordError, match="with 1 runs"):
        examples.record(status=status, reason="it broke", runs=(examples.run(1, 2),))
    with pytest.raises(RecordError, match="without a reason"):
        examples.record(status=status, reason=None)


def test_a_plan_is_there_where_it_is_planned_and_its_sum_is_what_is_asked_for() -> None:
    plan = CompilerPlan(
        "GPU", "compiler 1", {"weights": 1000, "activations": 20}, {"cuda_context": 3}
    )
    planned = {"status": Status.PLANNED, "reason": "no GPU", "runs": (), "plan": plan}
    record = examples.record(**planned, asked_bytes=1023)
    assert loads_record(dumps(record)) == record
    assert record.steady_bytes is None
    with pytest.raises(RecordError, match="1020 bytes, plan 1023"):
        examples.record(**planned, asked_bytes=1020)
    with pytest.raises(RecordError, match="status planned and plan None"):
        examples.record(**{**planned, "plan": None})
    with pytest.raises(RecordError, match="status measured and plan"):
        examples.record(plan=plan)


def test_measured_without_a_run_is_refused() -> None:
    with pytest.raises(RecordError, match="with 0 runs"):
        examples.record(runs=())


def test_another_schema_is_refused() -> None:
    data = json.loads(dumps(examples.record()))
    data["schema"] = 99
    with pytest.raises(RecordError, match="schema 99"):
        loads_record(json.dumps(data))


def test_damage_anywhere_is_a_record_error() -> None:
    text = dumps(examples.record())
    for end in range(0, len(text) - 2, 97):
        with pytest.raises(RecordError):
            loads_record(text[:end])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("status",), "excellent"),
        (("case", "shape", "batch_size"), "1"),
        (("case", "framework"), "../../etc"),
        (("runs", 0, "phases", 0, "peak_bytes"), 1.5),
        (("runs", 0, "phases", 0, "name"), "lunch"),
        (("environment",), None),
        (("layer", "extra"), 1),
    ],
)
def test_a_wrong_field_is_a_record_error(path: tuple[str | int, ...], value: object) -> None:
    data = json.loads(dumps(examples.record()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(RecordError):
        loads_record(json.dumps(data))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    )
)
def test_foreign_json_is_a_record_error(data: object) -> None:
    with pytest.raises(RecordError):
        loads_record(json.dumps(data))
