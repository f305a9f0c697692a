from pathlib import Path

import pytest

from memladder.core.case import Case, Workload
from memladder.core.errors import UnavailableError
from memladder.core.record import PHASES
from memladder.core.verification import Check
from memladder.frameworks._shared.base import Job, OutOfMemoryError
from memladder.meter.inside.worker import failure
from memladder.meter.outside.watch import Story, require_order
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
    Prepared,
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
    Checked((Check("llama", Workload(1, 1), 1, float("inf"), 2e-3),), {}),
    Prepared(),
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
        b'{"Hold": {"ns": 1' + b"0" * 400 + b"}}",
        b'{"Hold": {"ns": NaN}}',
        b'{"Hold": {"ns": 1e400}}',
        b'{"Hold": {"ns": 1, "ns": 2}}',
        b'{"Hold": {"ns": 1}, "Hold": {"ns": 1}}',
        b'{"Prepared": {"ns": 1}}',
        b'{"Finished": {"ns": 1, "passes": 1, "settings": {"a": Infinity}, "categories": {}}}',
        b'{"Finished": {"ns": 1, "passes": 9223372036854775808, "settings": {}, "categories": {}}}',
    ],
)
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a worker's message"):
        decode(line)


@pytest.mark.parametrize(
    "messages",
    [
        [Hold(5)],
        [Finished(5, 1, {}, {})],
        [PhaseStart("warm-up", 5)],
        [PhaseStart("weights", 5), PhaseStart("context", 6)],
        [PhaseStart("weights", 5), PhaseStart("weights", 6)],
        [PhaseStart("weights", 5), Hold(4)],
        [PhaseStart("weights", 5), PhaseStart("compile", 4)],
        [PhaseStart("weights", 101)],
        [PhaseStart("weights", -1)],
        [PhaseStart("weights", 5), Finished(1 << 62, 1, {}, {})],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[Message]) -> None:
    *before, last = messages
    story = Story(starts=[start for start in before if isinstance(start, PhaseStart)])
    with pytest.raises(ValueError, match="out of order"):
        require_order(story, last, 100)


def test_messages_in_order_are_taken() -> None:
    story = Story()
    for number, name in enumerate(PHASES):
        require_order(story, PhaseStart(name, number), 100)
        story.starts.append(PhaseStart(name, number))
        require_order(story, Hold(number), 100)
    require_order(story, Finished(50, 1, {}, {}), 100)


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
