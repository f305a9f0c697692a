import io

import pytest
from rich.console import Console

from memladder.core.case import Case, Workload
from memladder.core.record import Status
from memladder.core.units import GIB, MIB
from memladder.sweeps.live import Clock, SweepView, cell_text, duration
from tests.unit import examples

CASES = [Case("llama", "pytorch", shape, "cpu") for shape in (Workload(1, 1), Workload(32, 1))]


def test_cells_say_mib_or_the_status() -> None:
    assert cell_text(examples.record(steady=(12 * GIB,))) == "12,288"
    assert cell_text(examples.record(status=Status.OOM, reason="too big")) == "oom"


def test_the_eta_follows_what_cases_really_took() -> None:
    clock = Clock(CASES, 1)
    before = clock.eta_s()
    clock.finish(CASES[0], 10 * before, resumed=False)
    assert clock.eta_s() > 5 * before
    clock.finish(CASES[1], 1.0, resumed=False)
    assert clock.eta_s() == 0.0


def test_resumed_cases_say_nothing_about_speed() -> None:
    clock = Clock(CASES, 1)
    before = clock.eta_s()
    clock.finish(CASES[0], 0.001, resumed=True)
    assert before / 4 < clock.eta_s() < before


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_cases_statuses_and_warnings(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with SweepView(CASES, 1, console) as view:
        view.verifying("pytorch")
        view.started(CASES[0])
        view.finished(examples.record(steady=(2000 * MIB,)), 3.0, resumed=False)
        view.started(CASES[1])
        failed = examples.record(
            shape=Workload(32, 1), status=Status.FAILED, reason="it broke [red]"
        )
        view.finished(failed, 3.0, resumed=False)
    text = out.getvalue()
    assert "2,000" in text
    assert "it broke [red]" in text
    assert terminal or "checking PyTorch-Inductor against the fp32 reference" in text
    assert ("[2/2] llama_pytorch_32_1: failed" in text) is not terminal


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.9, 3600)] == ["0:00", "0:59", "60:00"]
