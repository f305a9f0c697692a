"""The page as a file: its data, its size, what can't break out of it."""

import dataclasses
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import memladder as package
from memladder.core.case import Workload
from memladder.core.errors import UnavailableError, UsageError
from memladder.core.record import Record, Status
from memladder.core.units import MIB
from memladder.paper.published import published
from memladder.predictor import api, gpus, model
from memladder.reports.html import comparison, fitting, rows
from memladder.reports.html.page import embedded, page
from memladder.reports.html.rows import Shown
from tests.unit.command import Command
from tests.unit.examples import record, verification

H100 = Path(__file__).parents[3] / "results" / "h100.json"
HOSTILE = "</script><script>alert(1)</script><!-- \"'&\u2028=cmd|' /C calc'!A0 \x1b[31m"


class _Page(HTMLParser):
    """The tags of a page, and the text of its blocks of JSON by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.blocks: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.blocks[self._inside] = self.blocks.get(self._inside, "") + data


def _shown(*records: Record) -> Shown:
    return Shown("here", records, (verification(),))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    package.report([H100], out)
    return out.read_text()


def test_h100(made: str) -> None:
    found = _Page(made)
    light, heavy = (json.loads(found.blocks[name]) for name in ("rows", "details"))
    held = json.loads(H100.read_text())["records"]
    assert len(light["rows"]) == len(heavy["cells"]) == len(held) == 96
    assert len(made.encode()) <= 5_000_000
    row = next(row for row in light["rows"] if row["id"] == "llama_ladder_fp16_int4_1_1")
    one = next(
        r
        for r in held
        if (r["case"]["model"], r["case"]["framework"]) == ("llama", "ladder_fp16_int4")
        and r["case"]["shape"] == {"batch_size": 1, "seq_len": 1}
    )
    steady = one["runs"][0]["phases"][-1]
    assert (steady["name"], row["bytes"]) == ("steady", steady["peak_bytes"])
    assert row["published"] == published().values["llama_ladder_fp16_int4_1_1"] * MIB
    # Weights of int4 with a scale of 16 bits for 128 values, norms in fp16: 4.125 bits and a bit.
    assert 0.0 < row["budget"] - one["layer"]["parameters"] * 4.125 / 8 < 4 * MIB


def test_each_ledger_is_the_reading(made: str) -> None:
    found = _Page(made)
    light, heavy = (json.loads(found.blocks[name]) for name in ("rows", "details"))
    for row, cell in zip(light["rows"], heavy["cells"], strict=True):
        if row["status"] in ("measured", "planned"):
            assert sum(entry[1] for entry in cell["ledger"]) == row["bytes"], row["id"]


def test_nothing_is_asked_of_a_network(made: str) -> None:
    shell = re.sub(r'<script type="application/json".*?</script>', "", made, flags=re.S)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", shell)
    assert "default-src 'none'" in shell
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|sendBeacon|innerHTML|eval)\b", shell)


@pytest.mark.parametrize("name", ["reason", "hint"])
def test_hostile_texts_stay_texts(name: str) -> None:
    bad = record(status=Status.FAILED, reason="it broke")
    bad = dataclasses.replace(bad, **{name: HOSTILE}, settings={HOSTILE: HOSTILE})
    harmless = _Page(page([_shown(record(status=Status.FAILED, reason="it broke"))]))
    text = page([_shown(bad)])
    found = _Page(text)
    assert found.tags == harmless.tags
    assert HOSTILE not in text
    (cell,) = json.loads(found.blocks["details"])["cells"]
    assert cell["raw"]["settings"] == {HOSTILE: HOSTILE}
    assert cell["raw"][name] == HOSTILE


def test_template_names_in_a_record_are_texts() -> None:
    text = page([_shown(record(status=Status.FAILED, reason="{{script}} {{rows}}"))])
    (row,) = json.loads(_Page(text).blocks["rows"])["rows"]
    assert row["reason"] == "{{script}} {{rows}}"


def test_embedded_round_trips() -> None:
    text = "<!--<script>\u2029 é 漢"
    assert json.loads(embedded({text: text})) == {text: text}
    assert not set("<>&\u2028\u2029") & set(embedded(text))


def test_trace_keeps_its_highest() -> None:
    base = record().runs[0]
    point = base.trace[0]
    points = tuple(
        dataclasses.replace(point, s=i / 100, pss_bytes=9 * MIB if i == 777 else i)
        for i in range(1001)
    )
    found = rows.trace(dataclasses.replace(base, trace=points))
    assert len(found["times"]) <= 240
    assert (max(found["sizes"]), found["times"][found["sizes"].index(9 * MIB)]) == (9 * MIB, 7770)


def test_command_is_quoted() -> None:
    one = record(shape=Workload(32, 1), steady=(1 * MIB, 2 * MIB))
    assert rows.command(one).startswith(
        "memladder measure --model llama --framework pytorch --batch-size 32 --seq-len 1"
        " --device cpu --repeats 2"
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2000,), (2001,), "same"),  # below a page, or 1 %
        ((2000,), (2100,), "once"),
        ((2000, 2060), (2100, 2050), "noise"),
        ((2000, 2001), (2100, 2101), "change"),
        ((2000, 2001), (2100,), "once"),
    ],
)
def test_verdicts(before: tuple[int, ...], after: tuple[int, ...], expected: str) -> None:
    one, two = (record(steady=tuple(s * MIB for s in sizes)) for sizes in (before, after))
    assert comparison.verdict(one, two) == expected


def test_compared_largest_first() -> None:
    shapes = [Workload(1, 1), Workload(32, 1)]
    before = [record(shape=shape) for shape in shapes]
    after = [
        record(shape=shapes[0], steady=(2100 * MIB,)),
        record(shape=shapes[1], steady=(900 * MIB,)),
    ]
    found = comparison.compare(before, after)
    assert [pair["after"] - pair["before"] for pair in found] == [-1100 * MIB, 100 * MIB]
    for pair in found:
        assert sum(size for _, size in pair["changes"]) == pair["after"] - pair["before"]


def test_tables_say_what_the_predictor_says() -> None:
    """500 questions: model, GPU, row, batch, context."""
    names = ("llama", "bloom")
    tables = fitting.tables(tuple(model.find(name) for name in names))
    draw, vllm_fp8 = random.Random(20), ("vllm", "fp8")
    for _ in range(500):
        place, gpu = draw.randrange(2), draw.choice(tables["gpus"])
        row = draw.choice(tables["models"][place]["rows"])
        b, c = draw.randrange(len(fitting.BATCHES)), draw.randrange(len(fitting.CONTEXTS))
        found = row["tables"][min(gpu["generation"], len(row["tables"]) - 1)]
        given: dict[str, Any] = {
            "batch_size": fitting.BATCHES[b],
            "past": fitting.CONTEXTS[c] - 1,
            "layers": "all",
            "gpu": gpu["name"],
            "settings": {"weight_format": "fp8"}
            if (row["framework"], row["format"]) == vllm_fp8
            else {},
        }
        if "reason" in found:
            with pytest.raises(UnavailableError) as refused:
                api.predict(names[place], row["framework"], **given)
            assert str(refused.value) == found["reason"]
            continue
        asked = api.predict(names[place], row["framework"], **given)
        total, margin = found["totals"][b][c], found["margins"][b][c] + gpu["spread"]
        assert total == asked.total_bytes
        assert (max(total - margin, 0), total + margin) == (asked.low_bytes, asked.high_bytes)
        assert gpu["usable"] == gpus.find(gpu["name"]).usable_bytes


def test_command_writes_a_page(memladder: Command, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    done = memladder("report", H100, "--out", out, "--model", "llama")
    assert done.code == 0
    assert str(out) in done.out
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("given", [["none.json"], [H100, "--out", "page.pdf"], [H100] * 9])
def test_bad_input_is_a_line(memladder: Command, given: list[str], tmp_path: Path) -> None:
    done = memladder("report", *given)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


def test_no_records() -> None:
    with pytest.raises(UsageError, match="no records"):
        page([Shown("here", (), ())])
