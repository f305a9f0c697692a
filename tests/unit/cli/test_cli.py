"""The command line as a user meets it: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memladder.cli.commands.frameworks import list_frameworks
from memladder.core.files import write_atomic
from memladder.frameworks._shared.base import Availability
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps.store import Store
from tests.unit import examples

ROOT = Path(__file__).parents[3]
MEMLADDER = (sys.executable, "-m", "memladder")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / name, *arguments, cwd=cwd)


BAD = [
    (["--model", "gpt5"], "unknown model 'gpt5'; known: bloom, llama"),
    (["--framework", "tf"], "unknown framework 'tf'; known: pytorch, onnxruntime"),
    (["--model", "llama,bloom"], "one model is measured at a time, not llama, bloom"),
    (["--framework", "all"], "one framework is measured at a time, not pytorch, onnxruntime"),
    (["--batch_size", "0"], "batch_size '0' is not a whole number from 1 to 65536"),
    (["--batch_size", "-1"], "batch_size '-1'"),
    (["--seq_len", "many"], "seq_len 'many'"),
    (["--seq_len", "1.5"], "seq_len '1.5'"),
    (["--seq_len", "9" * 400], "seq_len '999"),
    (["--seq_len", "10000000"], "seq_len '10000000' is not a whole number from 1 to 1048576"),
    (["--config", "missing.json"], "missing.json: No such file"),
    (["--device", "tpu"], "'tpu'"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--timeout", "-3"], "timeout '-3'"),
    (["--output-dir", "file"], "file"),
    (["--no-such-option"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = script("measure_memory.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "mistral"}', "model_type is 'mistral'"),
        ('{"model_type": "bloom", "hidden_size": 64, "n_head": 4}', "model_type is 'bloom'"),
        ('{"model_type": "llama", "hidden_size": -4}', "hidden_size '-4'"),
    ],
)
def test_bad_configs_are_one_line_and_status_2(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    done = script("measure_memory.py", "--config", "config.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "llama"], "--models measures, so it needs --reproduce"),
        (["--reproduce", "--shapes", "1by1"], "shape '1by1' is not of the form BATCHxSEQ"),
        (["--reproduce", "--frameworks", "tf"], "unknown framework 'tf'"),
        (["--reproduce", "--frameworks", "vllm"], "none of the frameworks vllm can run"),
        (["--reproduce", "--config", "c.json"], "--config c.json describes one model"),
        (["--reproduce", "--repeats", "0"], "repeats '0'"),
        (["--output-dir", "/dev/null/x"], "cannot write into folder /dev/null/x"),
    ],
)
def test_run_all_refuses_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = script("run_all.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_run_all_draws_the_published_figure(tmp_path: Path) -> None:
    done = script("run_all.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "png/memory_usage_a100.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pdf/memory_usage_a100.pdf").read_bytes().startswith(b"%PDF")


def test_the_published_figure_and_help_need_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['run_all.py']\n"
        "from memladder.cli.main import run_all\n"
        "try: run_all()\n"
        "except SystemExit as e: assert not e.code\n"
        "names = {'torch', 'transformers', 'onnx', 'onnxruntime', 'safetensors'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_loads_neither_rich_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['memladder', '--help']\n"
        "from memladder.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'numpy', 'matplotlib', 'psutil', 'pynvml', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("figure", "measure", "sweep", "frameworks", "show", "table", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_a_framework_that_is_not_here_prints_a_status_and_no_number(tmp_path: Path) -> None:
    done = script("measure_memory.py", "--framework", "vllm", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "Measure the memory for llama batch 1 seq 1 under vllm\n"
    assert "unavailable: " in done.stderr
    record = json.loads((tmp_path / "log/llama_vllm_1_1.json").read_text())
    assert (record["status"], record["runs"]) == ("unavailable", [])


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "log").locked():
        done = script("run_all.py", "--reproduce", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "another memladder is measuring into log" in done.stderr


@pytest.mark.parametrize("place", ["a folder", "a record", "a pipe"])
def test_where_results_can_not_go_is_refused_before_a_sweep(tmp_path: Path, place: str) -> None:
    results = tmp_path / "results.json"
    if place == "a folder":
        results.mkdir()
    elif place == "a pipe":
        os.mkfifo(results)
    else:
        results.write_text("{}")
    done = run(*MEMLADDER, "sweep", "--device", "cpu", "--results", results, cwd=tmp_path)
    assert done.returncode == 2
    assert str(results) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "log").exists()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    kept = Store(tmp_path / "log")
    kept.save(examples.record())
    kept.save(examples.record(model="bloom"))
    kept.save(examples.verification())
    write_atomic(tmp_path / "log" / "llama_pytorch_9_9.json", "{broken")
    return tmp_path / "log"


@pytest.mark.parametrize("form", ["md", "csv", "json"])
def test_table_prints_a_row_a_case(log: Path, form: str) -> None:
    done = run(*MEMLADDER, "table", log, "--format", form, cwd=log.parent)
    assert done.returncode == 0
    assert "llama_pytorch_9_9.json is not a record of memladder" in done.stderr
    for word in ("llama_pytorch_1_1", "bloom_pytorch_1_1", "measured", "2000.0", "2100.0"):
        assert word in done.stdout
    if form == "json":
        rows = json.loads(done.stdout)
        assert [row["steady_mib"] for row in rows] == [2000.0, 2000.0]


def test_table_refuses_other_formats(log: Path) -> None:
    done = run(*MEMLADDER, "table", log, "--format", "xml", cwd=log.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert "format 'xml' is not one of md, csv, json" in done.stderr


def test_show_explains_a_record(log: Path) -> None:
    done = run(*MEMLADDER, "show", log / "llama_pytorch_1_1.json", cwd=log.parent)
    assert done.returncode == 0
    for word in ("llama_pytorch_1_1", "measured", "steady", "float16", "Test CPU"):
        assert word in done.stdout


def test_figure_draws_a_store(log: Path) -> None:
    done = run(*MEMLADDER, "figure", log, cwd=log.parent)
    assert done.returncode == 0, done.stderr
    assert (log.parent / "png/memory_usage_cpu.png").exists()
    assert (log.parent / "pdf/memory_usage_cpu.pdf").exists()
    assert "llama_pytorch_1_1" in (log.parent / "png/memory_usage_cpu.md").read_text()


def test_machines_are_never_mixed_in_a_figure(log: Path) -> None:
    Store(log).save(
        examples.record(framework="onnxruntime", environment=examples.elsewhere("Other CPU"))
    )
    done = run(*MEMLADDER, "figure", log, cwd=log.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Other CPU" in done.stderr
    assert not (log.parent / "png/memory_usage_cpu.png").exists()


def test_frameworks_lists_every_system_with_its_reason(tmp_path: Path) -> None:
    done = run(*MEMLADDER, "frameworks", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0
    for key in ("pytorch", "onnxruntime", "tensorrt", "vllm_fp16_int4", "ladder_int8_int1"):
        assert key in done.stdout
    assert "runs on CUDA only" in done.stdout


def test_install_commands_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    install = "pip install 'memladder[pytorch]'"
    found = Availability(False, reason="it is missing", install=install)
    monkeypatch.setattr(sweep_cases, "availability", lambda *_: found)
    list_frameworks("cpu")
    assert install in capsys.readouterr().out


def test_doctor_names_the_compilers_and_the_memory(tmp_path: Path) -> None:
    done = run(*MEMLADDER, "doctor", cwd=tmp_path)
    assert done.returncode in (0, 1)
    for word in ("memory", "C++ compiler", "C compiler"):
        assert word in done.stdout


def test_the_start_is_lean(tmp_path: Path) -> None:
    best = min(_timed("measure_memory.py", "--help", cwd=tmp_path) for _ in range(5))
    assert best < 0.4


def _timed(*arguments: str, cwd: Path) -> float:
    """Seconds of the processor: those on the wall are other tests' too."""
    before = os.times()
    assert script(*arguments, cwd=cwd).returncode == 0
    after = os.times()
    return sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "tf"], "unknown framework 'tf'; known: "),
        (["create", "onnxruntime", "--device", "tpu"], "'tpu'"),
        (
            ["create", "onnxruntime", "--python", "nothing"],
            "nothing can't be started: No such file",
        ),
        (["use", "onnxruntime", "--python", "nothing"], "nothing is not an interpreter"),
        (["remove", "onnxruntime"], "onnxruntime has no environment of its own"),
    ],
)
def test_a_wrong_environment_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLADDER_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done = run(*MEMLADDER, "env", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
