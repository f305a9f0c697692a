"""How commands end: interrupted wherever they are, with output that can't be written, without a
home."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STOPPED = "memladder: stopped"
# Signals itself after some milliseconds, with the entry point's handlers in place by then.
STRIKE = """
import os, signal, sys, threading, time
from memladder.cli import entry
number, delay = int(sys.argv.pop(1)), float(sys.argv.pop(1))
def strike():
    while signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(os.getpid(), number)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=strike, daemon=True).start()
entry.main()
time.sleep(5)
"""


def run(
    code: str, *arguments: str, buffered: bool = True, **options: object
) -> subprocess.CompletedProcess[str]:
    known = {k: v for k, v in os.environ.items() if not (buffered and k == "PYTHONUNBUFFERED")}
    env = {**known, "PYTHONPATH": str(ROOT / "src"), **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-c", code, *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run(command, env=env, timeout=60, check=False, **given)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3])
def test_a_signal_while_importing_is_one_line(number: int, delay: float, tmp_path: Path) -> None:
    done = run(STRIKE, str(int(number)), str(delay), "frameworks", "--device", "cpu", cwd=tmp_path)
    if done.returncode == 0 and done.stderr == "":
        return  # It was through already.
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert done.stderr.startswith(STOPPED)


CONVERTED = """
import os, signal
from memladder.cli import ending, main
def convert(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise {} from None
ending.run(lambda args, standalone_mode: convert(), [])
"""


@pytest.mark.parametrize(
    "error",
    [
        "ValueError('could not determine the shape of an object')",
        "SystemError('a native function returned with an error set')",
        "__import__('memladder.core.errors').core.errors.FormatError('not numbers')",
    ],
)
def test_an_interrupt_that_a_library_turned_into_an_error_is_an_interrupt(error: str) -> None:
    """As safetensors does, whose code in Rust calls torch's, which calls Python's."""
    done = run(CONVERTED.format(error))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1), done.stderr
    assert done.stderr.startswith(STOPPED)


LOST = """
import os, signal, sys, time
from memladder.cli import entry, main
class Final:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
def application(args, standalone_mode):
    f = Final()
    del f
    time.sleep(20)
main.app = application
sys.argv = ["memladder", "x"]
entry.main()
"""


def test_an_interrupt_in_a_finaliser_is_not_lost() -> None:
    done = run(LOST)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert done.stderr.startswith(STOPPED)


def test_what_is_told_to_ignore_a_hangup_ignores_it() -> None:
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from memladder.cli import ending\n"
        "ending.run(lambda args, standalone_mode: os.kill(os.getpid(), signal.SIGHUP), [])"
    )
    assert (run(code).returncode, run(code).stderr) == (0, "")


MAIN = "from memladder.cli.entry import main; main()"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["frameworks", "--device=cpu"]])
def test_a_full_disk_behind_standard_output_is_one_line(
    arguments: list[str], buffered: bool
) -> None:
    with Path("/dev/full").open("wb") as full:
        env = {} if buffered else {"PYTHONUNBUFFERED": "1"}
        done = run(MAIN, *arguments, buffered=buffered, stdout=full, env=env)
    assert done.returncode == 2
    assert done.stderr == ("memladder: error: cannot write the output: No space left on device\n")


def test_standard_error_that_is_full_keeps_the_status() -> None:
    with Path("/dev/full").open("wb") as full:
        assert run(MAIN, "table", "nowhere", stderr=full).returncode == 2


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path) -> None:
    """As in a container that runs under a number of its own."""
    code = (
        "import os, pwd\nfrom memladder.cli import entry\n"
        "os.environ.pop('HOME', None)\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\nentry.main()"
    )
    env = {"MEMLADDER_CACHE": "", "XDG_CACHE_HOME": ""}
    done = run(code, "frameworks", "--device", "cpu", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "memladder: error: this user has no home folder; set MEMLADDER_CACHE to a folder\n"
    )
