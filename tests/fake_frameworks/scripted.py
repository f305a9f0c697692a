"""A framework that does, in a chosen phase, what the job's configuration says.

`config.values["script"]` maps a place (prepare, import, context, weights, compile, first run,
steady, settings) to the name of an act below; `config.values["argument"]` is what the act gets.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from memladder import models
from memladder.core.case import Case
from memladder.core.errors import UnavailableError
from memladder.frameworks._shared.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)

KEPT: list[Any] = []


def crash(argument: Any) -> None:
    raise ValueError("the first line\nand another")


def oom(argument: Any) -> None:
    raise OutOfMemoryError("no room for the scores", asked_bytes=2048 << 20)


def missing(argument: Any) -> None:
    raise UnavailableError("libthing.so is missing", "pip install thing")


def leave(argument: Any) -> None:
    print("about to leave", flush=True)
    os._exit(3)


def leave_well(argument: Any) -> None:
    os._exit(0)


def segfault(argument: Any) -> None:
    ctypes.string_at(0)


def killed(argument: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signalled(argument: Any) -> None:
    os.kill(os.getpid(), argument)


def nap(argument: Any) -> None:
    time.sleep(0.5)


def hang(argument: Any) -> None:
    time.sleep(600)


def allocate(argument: Any) -> None:
    size = int(argument)
    block = bytearray(size)
    block[::4096] = b"\1" * len(block[::4096])
    KEPT.append(block)


def hog(argument: Any) -> None:
    while True:
        allocate(16 << 20)
        time.sleep(0.002)


def transient(argument: Any) -> None:
    """Hold `argument` bytes for 30 ms of every 60."""
    block = bytearray(int(argument))
    block[::4096] = b"\1" * len(block[::4096])
    time.sleep(0.03)
    del block
    time.sleep(0.03)


def garbage(argument: Any) -> None:
    os.write(int(sys.argv[1]), b"\xff\x00 not a message\n")
    time.sleep(600)


def endless_line(argument: Any) -> None:
    while True:
        os.write(int(sys.argv[1]), b"x" * 65536)


def half_a_line(argument: Any) -> None:
    os.write(int(sys.argv[1]), b'{"PhaseStart": {"na')
    os._exit(0)


def family(argument: Any) -> None:
    """Start a child, a double-forked orphan, and one with a session of its own; note the pids."""
    for escape in (False, True):
        if os.fork() == 0:
            if os.fork() == 0:
                if escape:
                    os.setsid()
                    signal.signal(signal.SIGHUP, signal.SIG_IGN)
                with Path(argument).open("a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(600)
            if escape:
                os._exit(0)
            time.sleep(600)
    with Path(argument).open("a") as file:
        file.write(f"{os.getpid()}\n")


def family_and_hang(argument: Any) -> None:
    family(argument)
    time.sleep(600)


class ScriptedSession(Session):
    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        self._runs = 0
        act(job, "import")

    def context(self) -> None:
        act(self.job, "context")

    def weights(self) -> None:
        act(self.job, "weights")

    def compile(self) -> None:
        act(self.job, "compile")
        if self.job.config.values.get("announces"):
            self.announce(self.job.config.values["announces"])

    def run(self) -> None:
        self._runs += 1
        ahead = bool(self.job.config.values.get("announces"))
        act(self.job, "first run" if self._runs == 1 and not ahead else "steady")
        time.sleep(0.01)

    def output(self) -> Any:
        import numpy as np

        shape = self.job.case.shape
        size = self.job.config.values["hidden_size"]
        return np.zeros((shape.batch_size, shape.seq_len, size), np.float32)

    def settings(self) -> Mapping[str, Setting]:
        act(self.job, "settings")
        return {"runs": self._runs, "marker": os.environ.get("SCRIPTED_MARKER", "")}

    def categories(self) -> Mapping[str, int]:
        return {"weights": 2 * models.parameters(self.job.config)}


def act(job: Job, place: str) -> None:
    name = job.config.values.get("script", {}).get(place)
    if name is not None:
        globals()[name](job.config.values.get("argument"))


class Scripted(Framework):
    title: ClassVar[str] = "Scripted"
    packages: ClassVar[tuple[str, ...]] = ("numpy",)

    def availability(self, device: str) -> Availability:
        if device != "cpu":
            return Availability(False, reason="scripted runs on the CPU", install="buy a CPU")
        return Availability(True, version="1")

    def environment(self, case: Case) -> Mapping[str, str]:
        return {"SCRIPTED_MARKER": "set"}

    def prepare(self, job: Job) -> None:
        act(job, "prepare")

    def tolerance(self, device: str) -> float:
        return 2e-3

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        return ScriptedSession(job, announce)


FRAMEWORK = Scripted()
