from pathlib import Path

import pytest

from memladder.core.case import Case, Workload
from memladder.core.errors import UnavailableError
from memladder.core.record import Check
from memladder.frameworks.base import Job, OutOfMemoryError
from memladder.meter.inside.worker import failure
from memladder.meter.protocol import (
    Checked,
    Failure,
    Finished,
    Hold,
    JobText,
    Kind,
    Message,
    Mode,
    Order,
    PhaseStart,
    decode,
    decode_order,
    encode,
    one_line,
)
from memladder.models import LayerConfig

MESSAGES: list[Message] = [
    PhaseStart("weights", 12),
    Hold(13),
    Finished(14, 3, {"dtype": "float16", "threads": 2}, {"weights": 5}),
    Checked((Check("llama", Workload(1, 1), 1, 1e-3, 2e-3),), {}),
    Failure(Kind.OOM, "no room", 5, None),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_survive_the_pipe(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"Hold": {"ns": 1}, "Hold2": {}}',
        b'{"Hold": {"ns": "1"}}',
        b'{"Hold": {}}',
        b'{"Unknown": {}}',
        b'{"Order": {}}',
        b'{"Failure": {"kind": "measured", "message": "", "asked_bytes": null, "hint": null}}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a worker's message"):
        decode(line)


def test_an_order_survives_the_pipe() -> None:
    case = Case("llama", "pytorch", Workload(1, 4096), "cuda:1")
    job = Job(case, LayerConfig("llama", {"a": [1, {"b": None}]}), Path("cache"), 7)
    order = Order(Mode.MEASURE, "memladder.frameworks.pytorch", (JobText.of(job),), 2.0)
    again = decode_order(encode(order))
    assert again == order
    assert again.jobs[0].job() == job


def test_exceptions_become_failures() -> None:
    assert failure(OutOfMemoryError("full", 12)) == Failure(
        Kind.OOM, "OutOfMemoryError: full", 12, None
    )
    assert failure(MemoryError()).kind is Kind.OOM
    assert failure(UnavailableError("no lib", "pip install lib")) == Failure(
        Kind.UNAVAILABLE, "no lib", None, "pip install lib"
    )
    assert failure(SystemExit(0)).kind is Kind.FAILED
    assert failure(ValueError("first\nsecond")).message == "ValueError: first"


def test_a_reason_is_one_line_of_300_characters() -> None:
    assert one_line("\n \n  first \nsecond") == "first"
    assert one_line("") == ""
    assert len(one_line("x" * 1000)) == 300
