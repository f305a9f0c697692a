"""A row that claims int4 and runs, on the real engine, with fp16 weights."""

from __future__ import annotations

from collections.abc import Callable

from memladder.frameworks._shared.base import Job, Session
from memladder.frameworks.ladder import Ladder

_IGNORED = Ladder("fp16", "fp16")


class MisSet(Ladder):
    def prepare(self, job: Job) -> None:
        _IGNORED.prepare(job)

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        return _IGNORED.session(job, announce)


FRAMEWORK = MisSet("fp16", "int4")
