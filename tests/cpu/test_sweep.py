"""Sweeps as a user runs them, on narrow layers: finished, killed, interrupted, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from memladder import models
from memladder.core.record import Status
from memladder.sweeps import store

ROOT = Path(__file__).parents[2]
SHAPES = ((1, 1), (2, 8), (1, 64))


class Sweep:
    """One folder and the command that sweeps into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "config.json"
        config.write_text(json.dumps(dict(models.narrow_config("llama").values)))
        self.command = [
            *(sys.executable, str(ROOT / "run_all.py"), "--reproduce", "--device", "cpu"),
            *("--models", "llama", "--config", str(config), "--frameworks", "onnxruntime,vllm"),
            *("--shapes", ",".join(f"{b}x{s}" for b, s in SHAPES)),
            *("--output-dir", str(folder), "--cache-dir", str(folder / "cache")),
        ]

    def record(self, number: int) -> Path:
        batch_size, seq_len = SHAPES[number]
        return self.folder / "log" / f"llama_onnxruntime_{batch_size}_{seq_len}.json"

    def start(self, *more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.Popen(
            [*self.command, *more],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # What a shell starts in the background ignores it, and so would all below.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *more: str) -> tuple[int, str, str]:
        process = self.start(*more)
        out, err = self.end_of(process, 200)
        return process.returncode, out, err

    def end_of(self, process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
        """What it printed; one that does not end in time is killed, so that the next can work."""
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"))


def comes_true(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_sweep_loses_nothing_and_leaves_nothing(sweep: Sweep) -> None:
    process = sweep.start()
    assert comes_true(sweep.record(0).exists, 150)
    assert comes_true(lambda: len(family(process)) >= 2, 30)
    below = family(process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(below, timeout=5)[1] == []
    assert store.read(sweep.record(0)).records[0].status is Status.MEASURED
    assert not sweep.record(2).exists()


def test_the_next_run_resumes_and_finishes(sweep: Sweep) -> None:
    before = sweep.record(0).read_bytes()
    code, out, err = sweep.run()
    assert code == 0, err
    assert "llama_onnxruntime_1_1: " in err
    assert "already measured" in err
    assert "vllm can't run on cpu here" in err
    assert sweep.record(0).read_bytes() == before
    assert all(sweep.record(number).exists() for number in range(len(SHAPES)))
    for name in (
        "png/memory_usage_cpu.png",
        "pdf/memory_usage_cpu.pdf",
        "png/memory_usage_cpu.md",
        "report.html",
    ):
        assert name in out
        assert (sweep.folder / name).stat().st_size > 1000
    page = (sweep.folder / "png/memory_usage_cpu.md").read_text()
    assert "| llama_onnxruntime_1_64 |" in page
    assert "| vllm | " in page


def test_damaged_records_are_set_aside_and_measured_again(sweep: Sweep) -> None:
    path = sweep.record(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (sweep.folder / "log" / "notes.json").write_text("{}")
    code, _, err = sweep.run()
    assert code == 0, err
    assert f"{path.name} is not a record of memladder" in err.replace("\n", "")
    assert store.read(path).records[0].status is Status.MEASURED
    aside = {p.name for p in (sweep.folder / "log" / "set_aside").iterdir()}
    assert aside == {path.name, "notes.json"}


def test_ctrl_c_stops_cleanly(sweep: Sweep) -> None:
    process = sweep.start("--fresh")
    assert comes_true(lambda: len(family(process)) >= 2, 60)
    below = family(process)
    process.send_signal(signal.SIGINT)
    _, err = sweep.end_of(process, 10)
    assert process.returncode == 130
    assert (
        err.splitlines()[-1]
        == "memladder: stopped; what was finished is kept, the same command does the rest"
    )
    assert "Traceback" not in err
    assert psutil.wait_procs(below, timeout=5)[1] == []


def test_other_results_files_can_be_filled_from_the_log(sweep: Sweep) -> None:
    path = sweep.folder / "results" / "cpu.json"
    code, _, err = sweep.run("--results", str(path))
    assert code == 0, err
    contents = store.read(path)
    assert [r.status for r in contents.records] == [Status.MEASURED] * len(SHAPES)
    assert [v.framework for v in contents.verifications] == ["onnxruntime"]
    assert contents.verifications[0].agrees


def test_a_full_cache_disk_is_one_line(sweep: Sweep) -> None:
    """A layer larger than the disk is refused before anything is written."""
    huge = dict(models.narrow_config("llama").values) | {
        "hidden_size": 1 << 20,
        "intermediate_size": 1 << 20,
        "num_attention_heads": 1 << 13,
        "num_key_value_heads": 1 << 13,
        "head_dim": 128,
    }
    config = sweep.folder / "huge.json"
    config.write_text(json.dumps(huge))
    code, out, err = sweep.run("--config", str(config), "--shapes", "3x1")
    assert (code, out) == (2, "")
    assert "needs" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (sweep.folder / "log" / "llama_onnxruntime_3_1.json").exists()
