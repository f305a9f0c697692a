"""The runner with real processes, on the CPU: what is measured, and how everything else ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from memladder import models
from memladder.checks.calibration import calibrate
from memladder.core.case import Case, Workload
from memladder.core.errors import UnavailableError, UsageError, WorkerError
from memladder.core.host import HostMemory
from memladder.core.record import PHASES, Record, Source, Status, dumps, loads_record
from memladder.core.units import MIB
from memladder.core.verification import Verification, loads_verification
from memladder.frameworks._shared.base import Framework, Job
from memladder.meter.outside import patience, runner, watch
from memladder.models import LayerConfig
from tests.unit.examples import ENVIRONMENT

FAKES = Path(__file__).parents[1] / "fake_frameworks"
LIMITS = runner.Limits(timeout_s=60.0)
STEADY_S = 0.2

Measure = Callable[..., Record]


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> Framework:
    """The scripted framework, importable here and in workers."""
    monkeypatch.syspath_prepend(str(FAKES))
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{known}" if known else str(FAKES))
    import scripted

    return scripted.FRAMEWORK


@pytest.fixture
def measure(framework: Framework, tmp_path: Path) -> Measure:
    """Measure a script: `measure({"weights": "crash"}, argument=…, limits=…, …)`."""

    def run(
        script: dict[str, str],
        argument: Any = None,
        announces: str | None = None,
        repeats: int = 1,
        limits: runner.Limits = LIMITS,
        **options: Any,
    ) -> Record:
        before = children()
        record = runner.measure(
            job(tmp_path, script, argument, announces),
            framework,
            repeats=repeats,
            limits=limits,
            log_path=tmp_path / "case.log",
            module="scripted",
            steady_s=options.pop("steady_s", STEADY_S),
            **options,
        )
        assert children() == before
        assert loads_record(dumps(record)) == record
        return record

    return run


def job(
    tmp_path: Path,
    script: dict[str, str],
    argument: Any = None,
    announces: str | None = None,
    device: str = "cpu",
) -> Job:
    values = dict(models.narrow_config("llama").values)
    values |= {"script": script, "argument": argument, "announces": announces}
    case = Case("llama", "scripted", Workload(1, 1), device)
    return Job(case, LayerConfig("llama", values), tmp_path / "cache")


def children() -> set[int]:
    """Our own children. Threads of others may end meanwhile, so /proc is not read by hand."""
    return {process.pid for process in psutil.Process().children()}


def alive(pid: int) -> bool:
    """Is there a process of that number that has not ended yet?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("size", [1 * MIB, 64 * MIB, 1000 * MIB])
def test_the_meter_reads_known_bytes(size: int, tmp_path: Path) -> None:
    (reading,) = calibrate("cpu", tmp_path / "calibration.log", [size])
    assert abs(reading.read_bytes - size) <= 2 * MIB + size // 100
    assert reading.holds


def test_a_measured_case_has_all_phases_in_order_and_a_number(measure: Measure) -> None:
    record = measure({"weights": "allocate"}, argument=100 * MIB)
    assert record.status is Status.MEASURED, record.reason
    (run,) = record.runs
    assert tuple(phase.name for phase in run.phases) == PHASES
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(run.phases))
    ends = {phase.name: phase.end_bytes for phase in run.phases}
    assert ends["weights"] - ends["context"] == pytest.approx(100 * MIB, abs=MIB)
    assert run.steady_bytes >= 100 * MIB
    assert run.source is Source.PSS
    assert record.settings["marker"] == record.settings["SCRIPTED_MARKER"] == "set"
    assert run.categories == {"weights": 2 * models.parameters(models.narrow_config("llama"))}
    assert run.passes == record.settings["runs"] - 1
    assert record.layer is not None
    assert record.layer.weight_bytes == 2 * models.parameters(models.narrow_config("llama"))
    assert record.environment.packages.keys() == {"numpy"}


def test_polls_come_at_100_hz_and_every_phase_was_read(measure: Measure) -> None:
    record = measure({}, steady_s=1.0)
    (run,) = record.runs
    assert run.polls_per_s >= 100
    # The longest gap is the scheduler's on a busy machine; it must be told, and be no hang.
    assert 1 / run.polls_per_s <= run.longest_gap_s < 0.5
    assert all(phase.polls >= 2 and phase.pss_peak_bytes > 0 for phase in run.phases)
    assert 2 <= len(run.trace) <= 2000
    assert [point.s for point in run.trace] == sorted(point.s for point in run.trace)


def test_a_short_peak_in_steady_is_counted(measure: Measure) -> None:
    record = measure({"steady": "transient"}, argument=200 * MIB, steady_s=1.0)
    steady = record.runs[0].phases[-1]
    assert steady.peak_bytes - steady.end_bytes == pytest.approx(200 * MIB, rel=0.02)
    assert steady.pss_missed_bytes <= 0.01 * steady.peak_bytes


def test_a_session_may_announce_the_first_run_itself(measure: Measure) -> None:
    record = measure({}, announces="first run")
    assert record.status is Status.MEASURED, record.reason
    assert tuple(phase.name for phase in record.runs[0].phases) == PHASES
    assert record.runs[0].passes == record.settings["runs"]


def test_a_session_may_announce_nothing_else(measure: Measure) -> None:
    record = measure({}, announces="steady")
    assert record.status is Status.FAILED
    assert "announced 'steady' in phase 'compile'" in (record.reason or "")


def test_three_repeats_agree(measure: Measure) -> None:
    events: list[runner.Event] = []
    record = measure({"weights": "allocate"}, 100 * MIB, repeats=3, on_event=events.append)
    assert len(record.runs) == 3
    assert record.spread is not None
    assert record.spread < 0.02
    assert [e.repeat for e in events] == sorted(e.repeat for e in events)
    seen = [phase for phase, _ in itertools.groupby(e.phase for e in events if e.repeat == 2)]
    assert [phase for phase in seen if phase != "start"] == list(PHASES)
    assert str(events[-1]).startswith("run 3 of 3, steady, ")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("crash", "ValueError: the first line (in phase {phase})"),
        ("leave", "the worker exited with status 3; its last words: about to leave (in phase"),
        ("leave_well", "the worker exited with status 0 (in phase {phase})"),
        ("segfault", "the worker was ended by SIGSEGV (in phase {phase})"),
        ("killed", "the worker was ended by SIGKILL (in phase {phase})"),
        ("garbage", "not a worker's message: "),
        ("endless_line", "not a worker's message: "),
        ("half_a_line", "not a worker's message: "),
    ],
)
def test_a_breakdown_is_failed_and_never_a_number(measure: Measure, act: str, reason: str) -> None:
    record = measure({"weights": act})
    assert record.status is Status.FAILED
    assert record.reason is not None
    assert record.reason.startswith(reason.format(phase="weights"))
    assert "\n" not in record.reason
    assert record.steady_bytes is None
    assert record.runs == ()


@pytest.mark.parametrize(
    "place", ["prepare", "import", "compile", "first run", "steady", "settings"]
)
def test_a_breakdown_in_any_phase_is_failed(measure: Measure, place: str) -> None:
    record = measure({place: "crash"})
    assert (record.status, record.runs) == (Status.FAILED, ())
    where = "steady" if place == "settings" else place
    assert record.reason == f"ValueError: the first line (in phase {where})"


def test_a_preparation_that_ends_well_and_made_nothing_is_failed(measure: Measure) -> None:
    record = measure({"prepare": "leave_well"})
    assert (record.status, record.runs) == (Status.FAILED, ())
    assert record.reason == "the worker exited with status 0 (in phase prepare)"


def test_the_log_holds_what_the_worker_said(measure: Measure, tmp_path: Path) -> None:
    measure({"steady": "crash"})
    log = (tmp_path / "case.log").read_text()
    assert "Traceback" in log
    assert "and another" in log


def test_an_allocation_that_fails_is_out_of_memory(measure: Measure) -> None:
    record = measure({"first run": "oom"})
    assert record.status is Status.OOM
    assert record.asked_bytes == 2048 * MIB
    assert "no room for the scores" in (record.reason or "")
    assert record.steady_bytes is None


def test_a_hog_is_ended_before_the_host_is(measure: Measure) -> None:
    limits = runner.Limits(timeout_s=60.0, case_bytes=300 * MIB)
    start = time.monotonic()
    record = measure({"weights": "hog"}, limits=limits)
    assert record.status is Status.OOM
    assert "its limit is 300.0 MiB" in (record.reason or "")
    assert time.monotonic() - start < 20


def host(root: Path, used_mib: int, total_mib: int = 16 << 10) -> Path:
    """A root folder whose kernel says so."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    part = root / "proc/meminfo.part"
    part.write_text(
        f"MemTotal: {total_mib << 10} kB\nMemAvailable: {(total_mib - used_mib) << 10} kB\n"
    )
    part.replace(root / "proc/meminfo")
    (root / "proc/vmstat").write_text("oom_kill 0\n")
    return root


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of 16 GiB that is told how much of it is in use."""
    root = host(tmp_path / "host", 1000)
    for module in (watch, patience):
        monkeypatch.setattr(module, "HostMemory", lambda: HostMemory(root))
    return root


def test_a_host_that_others_have_filled_is_busy_and_no_case_is_started(
    measure: Measure, played: Path
) -> None:
    host(played, 15_500)
    phases: list[str] = []
    limits = runner.Limits(timeout_s=60.0, patience_s=1.0)
    record = measure({}, limits=limits, on_event=lambda event: phases.append(event.phase))
    assert record.status is Status.BUSY
    assert (record.reason or "").startswith(
        "host memory: 15.1 GiB of 16.0 GiB were in use before the case; the limit is 92%; "
    )
    assert set(phases) == {"waiting for memory that others hold"}


def test_a_case_that_others_push_out_is_tried_again(measure: Measure, played: Path) -> None:
    phases: list[str] = []

    def fill_once(event: runner.Event) -> None:
        if event.phase == "compile" and "compile" not in phases:
            host(played, 15_500)
        if event.phase.startswith("waiting"):
            host(played, 1000)
        phases.append(event.phase)

    record = measure({"compile": "nap"}, on_event=fill_once)
    assert record.status is Status.MEASURED, record.reason
    assert "waiting for memory that others hold" in phases


def test_others_that_stay_are_named(measure: Measure, played: Path) -> None:
    size = 300 * MIB
    hog = subprocess.Popen(
        [sys.executable, "-c", f"x = bytearray(b'1') * {size}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert hog.stdout is not None
    hog.stdout.readline()

    def fill(event: runner.Event) -> None:
        if event.phase == "compile":
            host(played, 15_500)

    limits = runner.Limits(timeout_s=60.0, patience_s=1.0)
    try:
        record = measure({"compile": "hang"}, limits=limits, on_event=fill)
    finally:
        hog.kill()
        hog.communicate()
    assert record.status is Status.BUSY
    assert "; others: " in (record.reason or "")


def test_a_case_that_fills_the_host_itself_is_out_of_memory(measure: Measure, played: Path) -> None:
    def follow(event: runner.Event) -> None:
        host(played, 100 + event.current_bytes // MIB, total_mib=1000)

    host(played, 100, total_mib=1000)
    record = measure({"weights": "hog"}, on_event=follow)
    assert record.status is Status.OOM
    assert "the limit is 92%" in (record.reason or "")
    assert record.asked_bytes is not None
    assert record.asked_bytes > 700 * MIB


def test_a_hang_is_a_timeout(measure: Measure) -> None:
    record = measure({"compile": "hang"}, limits=runner.Limits(timeout_s=2.0))
    assert record.status is Status.TIMEOUT
    assert record.reason == "still in phase compile after 2 s"


def test_a_library_found_missing_late_is_unavailable(measure: Measure) -> None:
    record = measure({"import": "missing"})
    assert (record.status, record.hint) == (Status.UNAVAILABLE, "pip install thing")
    assert (record.reason or "").startswith("libthing.so is missing")


def test_a_framework_that_cannot_run_is_not_started(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.environment, "describe", lambda case, _: ENVIRONMENT)
    log = tmp_path / "case.log"
    record = runner.measure(
        job(tmp_path, {}, device="cuda:0"), framework, repeats=1, limits=LIMITS, log_path=log
    )
    assert (record.status, record.hint) == (Status.UNAVAILABLE, "buy a CPU")
    assert not log.exists()
    with pytest.raises(UnavailableError, match="runs on the CPU"):
        runner.verify(
            "scripted", framework, "cuda:0", cache_dir=tmp_path, limits=LIMITS, log_path=log
        )


def test_zero_repeats_and_an_unwritable_log_are_refused(
    measure: Measure, framework: Framework, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="repeats 0"):
        measure({}, repeats=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        runner.measure(
            job(tmp_path, {}),
            framework,
            repeats=1,
            limits=LIMITS,
            log_path=tmp_path / "file" / "case.log",
            module="scripted",
        )


def test_orphans_are_counted_and_ended(measure: Measure, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    record = measure({"weights": "family"}, argument=str(pids))
    assert record.status is Status.MEASURED, record.reason
    family = [int(line) for line in pids.read_text().split()]
    assert len(family) == 3
    assert not any(alive(pid) for pid in family)
    rss = {phase.name: phase.rss_peak_bytes for phase in record.runs[0].phases}
    # Four forked copies beside the worker itself.
    assert rss["steady"] > 2 * rss["context"]


def test_what_a_view_raises_ends_the_case_and_is_raised(measure: Measure, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before = children()

    def interrupt(event: runner.Event) -> None:
        if event.phase == "compile":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"weights": "family", "compile": "hang"}, argument=str(pids), on_event=interrupt)
    assert children() == before
    assert not any(alive(int(line)) for line in pids.read_text().split())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_runner(
    framework: Framework, tmp_path: Path, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"
    program = (
        "import scripted, signal, sys\n"
        "from pathlib import Path\n"
        "from memladder.core.case import Case, Workload\n"
        "from memladder.frameworks._shared.base import Job\n"
        "from memladder.meter.outside import runner\n"
        "from memladder.models import LayerConfig\n"
        # What a shell starts in the background ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "values = dict(script={'weights': 'family_and_hang'}, argument=sys.argv[1])\n"
        "case = Case('llama', 'scripted', Workload(1, 1), 'cpu')\n"
        "folder = Path(sys.argv[1]).parent\n"
        "runner.run_once(Job(case, LayerConfig('llama', values), folder), 'scripted',\n"
        "    variables={}, limits=runner.Limits(), log_path=folder / 'case.log')\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program, str(pids)], stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3, 20)
        family = [int(line) for line in pids.read_text().split()]
        assert all(alive(pid) for pid in family)
        driver.send_signal(number)
        driver.wait(10)
        assert wait_until(lambda: not any(alive(pid) for pid in family), 2)
    finally:
        driver.kill()
        driver.wait()


def test_weights_in_another_format_than_the_name_says_are_a_failure(
    framework: Framework, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    import misset

    record = runner.measure(
        Job(
            Case("llama", "misset", Workload(1, 1), "cpu"),
            models.narrow_config("llama"),
            tmp_path / "cache",
        ),
        misset.FRAMEWORK,
        repeats=1,
        limits=LIMITS,
        log_path=tmp_path / "case.log",
        module="misset",
        steady_s=STEADY_S,
    )
    assert (record.status, record.runs) == (Status.FAILED, ())
    # 256 · (256 + 128 + 128 + 256) + 3 · 256 · 704 elements and two norms of 256: 737,792.
    assert record.reason == (
        "the weights take 1.4 MiB where those of Ladder-W_INT4 A_FP16 take 0.4 MiB: they are in "
        "another format (in phase steady)"
    )


def test_what_can_not_be_read_is_checked_by_what_it_holds(
    framework: Framework, tmp_path: Path
) -> None:
    import opaque

    def verified(model: str) -> Verification:
        return runner.verify(
            "opaque",
            opaque.FRAMEWORK,
            "cpu",
            cache_dir=tmp_path / "cache",
            limits=LIMITS,
            log_path=tmp_path / "verify.log",
            model_names=[model],
            shapes=[Workload(1, 1)],
            module="opaque",
        )

    right, wrong = verified("llama"), verified("bloom")
    assert right.agrees
    assert not wrong.agrees
    assert loads_verification(dumps(wrong)) == wrong
    assert (right.checks, wrong.checks) == ((), ())
    assert right.structure is not None
    assert wrong.structure is not None
    (held,) = right.structure
    assert held.weight_bytes == held.expected_bytes == 2 * 737_792
    assert wrong.structure[0].layers == 2
    assert wrong.structure[0].differing == (
        "mlp.dense_h_to_4h.weight",
        "self_attention.dense.bias",
    )
    assert wrong.models == {"bloom"}


def test_verify_names_the_log_of_a_crash(framework: Framework, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"scripted: .*; log: .*verify.log"):
        runner.verify(
            "scripted",
            framework,
            "cpu",
            cache_dir=tmp_path / "cache",
            limits=runner.Limits(timeout_s=1.0),
            log_path=tmp_path / "verify.log",
            module="scripted",
        )


def test_verify_tells_a_wrong_output(framework: Framework, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    verification = runner.verify(
        "scripted",
        framework,
        "cpu",
        cache_dir=tmp_path / "cache",
        limits=LIMITS,
        log_path=tmp_path / "verify.log",
        model_names=["llama"],
        shapes=[Workload(1, 1), Workload(2, 3)],
        module="scripted",
    )
    # Zeros for an output: the error is the reference's own size.
    assert [check.error for check in verification.checks] == pytest.approx([1.0, 1.0])
    assert not verification.agrees
    assert json.loads(dumps(verification))["checks"][0]["tolerance"] == 2e-3


def guard_of_the_only_worker() -> int:
    """The process id of the guard below this process."""
    (pid,) = [
        process.pid
        for process in psutil.Process().children()
        if "memladder.meter.inside.guard" in process.cmdline()
    ]
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGQUIT])
def test_a_guard_that_is_killed_or_stopped_fails_the_case_at_once(
    measure: Measure, tmp_path: Path, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"

    struck: list[int] = []

    def strike(event: runner.Event) -> None:
        if event.phase == "compile" and not struck:
            struck.append(guard_of_the_only_worker())
            os.kill(struck[0], number)

    began = time.monotonic()
    record = measure({"weights": "family", "compile": "hang"}, str(pids), on_event=strike)
    assert record.status is Status.FAILED
    assert "the worker's guard was " in (record.reason or "")
    assert time.monotonic() - began < 20
    family = [int(line) for line in pids.read_text().split()]
    assert len(family) == 3
    assert not any(alive(pid) for pid in family)
    assert measure({}).status is Status.MEASURED


def test_what_is_sent_to_everybody_does_not_end_the_guard(measure: Measure) -> None:
    def strike(event: runner.Event) -> None:
        if event.phase == "compile":
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(guard_of_the_only_worker(), number)

    record = measure({}, on_event=strike)
    assert record.status is Status.MEASURED, record.reason


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGRTMIN, "SIGRTMIN"), (signal.SIGRTMIN + 3, "SIGRTMIN+3"), (33, "signal 33")],
)
def test_every_signal_has_a_name(measure: Measure, number: int, name: str) -> None:
    record = measure({"weights": "signalled"}, argument=int(number))
    assert record.status is Status.FAILED
    assert record.reason == f"the worker was ended by {name} (in phase weights)"
