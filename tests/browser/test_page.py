"""The page in a browser: what is drawn, filtered, sorted, saved, compared, and answered."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memladder
from memladder.core.errors import MemladderError
from memladder.core.record import Status
from memladder.core.units import MIB
from memladder.predictor import api
from memladder.reports.html.page import page
from memladder.reports.html.rows import Shown
from tests.unit.examples import record, verification

H100 = Path(__file__).parents[2] / "results" / "h100.json"
HOSTILE = "</script><img src=x onerror=document.title='taken'>\"' \x1b[31mred\u202e"
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return memladder.report([H100], tmp_path_factory.mktemp("page") / "h100.html")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A page of two stores: what changed, what is noise, what only ran once."""
    sizes = {"pytorch": ((2000, 2001), (2500, 2501)), "ladder": ((900, 940), (930, 910))}
    sizes["vllm"] = ((3000,), (3100,))
    stores = [
        tuple(
            record(framework=name, steady=tuple(size * MIB for size in both[side]))
            for name, both in sizes.items()
        )
        for side in (0, 1)
    ]
    checks = tuple(verification(name) for name in sizes)
    out = tmp_path / "two.html"
    out.write_text(page([Shown("old", stores[0], checks), Shown("new", stores[1], checks)]))
    return out


def _texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return list(browser.execute_script(script, selector))


def _click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_first_chart_is_there_soon(opened: Open, h100: Path) -> None:
    browser = opened(h100)
    assert len(_texts(browser, ".row")) == 96
    drawn = browser.execute_script("return performance.getEntriesByName('figure')[0].startTime")
    # 1.5 s on two cores of their own; tests share theirs.
    assert drawn < 5000


def test_filters_change_what_is_drawn(opened: Open, h100: Path) -> None:
    browser = opened(h100)
    _click(browser, "#filter-model input[value=LLAMA], #filter-model input")
    _click(browser, "#filter-workload input[value='1x1']")
    rows = _texts(browser, ".row")
    assert 0 < len(rows) < 20
    assert len(_texts(browser, "#cells tbody tr")) == len(rows)
    assert _texts(browser, "#count") == [f"{len(rows)} of 96 cells"]
    _click(browser, "#filter-workload input[value='1x1']")
    assert len(_texts(browser, ".row")) == 3 * len(rows)


def test_toggles_change_what_is_drawn(opened: Open, h100: Path) -> None:
    browser = opened(h100)
    width = "return document.querySelector('.bar').style.width"
    counts = {
        name: "return document.querySelectorAll('#chart .%s').length" % mark  # noqa: UP031
        for name, mark in (
            ("published", "published"),
            ("predicted", "interval"),
            ("budget", "floor"),
        )
    }
    for name, script in counts.items():
        before = browser.execute_script(script)
        _click(browser, f"#{name}")
        assert (before > 0) != (browser.execute_script(script) > 0), name
    logarithmic = browser.execute_script(width)
    _click(browser, "#log")
    linear = browser.execute_script(width)
    assert linear != logarithmic
    first = _texts(browser, ".row .value")[0]
    _click(browser, "#net")
    assert float(_texts(browser, ".row .value")[0].split()[0].replace(",", "")) == pytest.approx(
        float(first.split()[0].replace(",", "")) - 518, abs=0.1
    )
    assert browser.execute_script("return document.querySelectorAll('.bar.planned').length") == 6
    assert browser.execute_script("return document.querySelectorAll('.bar.measured').length") > 80


def test_keyboard_and_tooltip(opened: Open, h100: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = opened(h100)
    browser.execute_script("document.querySelector('.row').focus()")
    tip = browser.find_element("id", "tip")
    assert "5,681,184,768" in tip.text
    assert "backend=inductor" in tip.text
    assert "weights 4,704.4" in tip.text
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    label = browser.switch_to.active_element.get_attribute("aria-label")
    assert label.startswith("ONNXRuntime, BLOOM, 1x1, 5,372.0 MiB, measured")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    dialog = browser.find_element("id", "cell")
    assert "memladder measure --model bloom --framework onnxruntime" in dialog.text
    assert len(_texts(browser, "#cell svg.time")) == 1
    assert len(_texts(browser, "#cell .stack")) == 2
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.execute_script("return document.getElementById('cell').open")


def test_table_sorts_and_saves(opened: Open, h100: Path) -> None:
    browser = opened(h100)
    place = browser.execute_script(
        "return [...document.querySelectorAll('thead button')]"
        ".find((one) => one.textContent === 'bytes').dataset.column"
    )
    for sign in (1, -1):
        _click(browser, f"[data-column='{place}']")
        saved = json.loads(browser.execute_script("return memladder.toJson()"))
        sizes = [row["bytes"] for row in saved if row["bytes"] is not None]
        assert sizes == sorted(sizes, reverse=sign < 0)
        assert len(saved) == 96
        # What has no bytes is last both ways.
        assert [row["bytes"] for row in saved][len(sizes) :] == [None] * (96 - len(sizes))
    lines = list(csv.DictReader(io.StringIO(browser.execute_script("return memladder.toCsv()"))))
    assert [line["id"] for line in lines] == [row["id"] for row in saved]
    assert [line["bytes"] for line in lines] == [
        "" if row["bytes"] is None else str(row["bytes"]) for row in saved
    ]


def test_form_says_what_the_predictor_says(opened: Open, h100: Path) -> None:
    """500 questions, asked of the page and of the predictor."""
    browser = opened(h100)
    tables = browser.execute_script("return memladder.data.fit")
    draw = random.Random(20)
    asked = [
        [
            draw.choice(["llama", "bloom"]),
            draw.choice(tables["gpus"])["name"],
            draw.choice(tables["batches"]),
            draw.choice(tables["contexts"]),
        ]
        for _ in range(500)
    ]
    script = "return arguments[0].map((question) => memladder.answers(...question))"
    for (name, gpu, batch, context), rows in zip(
        asked, browser.execute_script(script, asked), strict=True
    ):
        row = draw.choice(rows)
        is_fp8 = (row["framework"], row["format"]) == ("vllm", "fp8")
        settings = {"weight_format": "fp8"} if is_fp8 else {}
        question = {"batch_size": batch, "past": context - 1, "layers": "all", "gpu": gpu}
        if "reason" in row:
            with pytest.raises(MemladderError, match=re.escape(row["reason"])):
                api.predict(name, row["framework"], settings=settings, **question)
            continue
        found = api.predict(name, row["framework"], settings=settings, **question)
        room = api.device(gpu, None).usable_bytes
        assert (row["needed"], row["low"], row["high"]) == (
            found.total_bytes,
            found.low_bytes,
            found.high_bytes,
        )
        assert (row["fits"], row["surely"]) == (
            room >= found.total_bytes,
            room >= found.high_bytes,
        )


def test_form_ranks_as_fit_does(opened: Open, h100: Path) -> None:
    browser = opened(h100)
    script = "return memladder.answers('llama', arguments[0], 1, 4096)"
    for gpu in ("H100", "RTX 4090"):
        rows = browser.execute_script(script, gpu)
        expected = api.fit("llama", gpu, context=4096)
        assert [(row["framework"], row["format"], row["left"]) for row in rows] == [
            (row.framework, row.format, row.left_bytes) for row in expected
        ]
    browser.execute_script(
        "const gpu = document.getElementById('fit-gpu'); gpu.value = 'L4';"
        "gpu.dispatchEvent(new Event('change'))"
    )
    assert _texts(browser, "#answer")[0].startswith("Yes: ladder_int8_int1 in int1")


def test_two_stores(opened: Open, two: Path) -> None:
    browser = opened(two)
    assert len(_texts(browser, ".row")) == 6
    assert [text.split("_1_1")[0] for text in _texts(browser, "#differences tbody th")] == [
        "llama_pytorch",
        "llama_vllm",
    ]
    _click(browser, "#every")
    assert _texts(browser, "#differences .tag") == ["change", "once", "same"] or _texts(
        browser, "#differences .tag"
    ) == ["change", "once", "noise"]


def test_hostile_records_are_texts(opened: Open, tmp_path: Path) -> None:
    """In markup, in attributes, in a file for a spreadsheet."""
    bad = record(status=Status.FAILED, reason=HOSTILE, hint=HOSTILE)
    bad = dataclasses.replace(bad, settings={HOSTILE: HOSTILE})
    formulas = [
        record(framework=f"f{i}", status=Status.FAILED, reason=text)
        for i, text in enumerate(("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", 'a "b", c\nd'))
    ]
    out = tmp_path / "hostile.html"
    out.write_text(page([Shown(HOSTILE, (bad, *formulas), ())]))
    browser = opened(out)
    _click(browser, ".row")
    assert browser.title == "memladder report"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    shown = _texts(browser, "#cell dd")
    assert any("<img src=x" in text and "\\u001b[31m" in text for text in shown)
    assert not any(letter in text for text in shown for letter in "\x1b\u202e")
    lines = list(csv.DictReader(io.StringIO(browser.execute_script("return memladder.toCsv()"))))
    reasons = {line["framework"]: line["reason"] for line in lines}
    assert [reasons[f"f{i}"] for i in range(4)] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)"]
    assert reasons["f6"] == 'a "b", c d'
    assert not any(value.startswith(tuple("=+-@\t\r")) for line in lines for value in line.values())


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows(opened: Open, h100: Path, dark: bool, width: int) -> None:
    browser = opened(h100, dark=dark, width=width)
    assert browser.execute_script("return document.documentElement.dataset.theme") == (
        "dark" if dark else "light"
    )
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(wide)
    _click(browser, ".row")
    assert browser.execute_script(wide)
    inside = "const d = document.getElementById('cell'); return d.scrollWidth <= d.clientWidth"
    assert browser.execute_script(inside)


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(opened: Open, two: Path, dark: bool) -> None:
    """axe-core's rules for landmarks, names, tables, contrast: page, filter, cell."""
    found = importlib.util.find_spec("axe_selenium_python")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no axe-core: pip install 'memladder[dev]'")
    (script,) = Path(found.submodule_search_locations[0]).rglob("axe.min.js")
    browser = opened(two, dark=dark)
    # Behind an open cell the rest of the page is inert.
    for before, where in (
        ("", "document"),
        ("document.querySelector('.filter').open = true", "document"),
        ("document.querySelector('.row').click()", "'#cell'"),
    ):
        browser.execute_script(before)
        browser.execute_script(script.read_text(encoding="utf-8"))
        faults = browser.execute_async_script(
            f"const done = arguments[0]; axe.run({where}).then((one) => done(one.violations))"
        )
        assert [(one["id"], [n["html"][:120] for n in one["nodes"][:3]]) for one in faults] == []
