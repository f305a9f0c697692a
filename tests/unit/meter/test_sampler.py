"""The sampler's readings of a worker that holds still, when its threads have had no turn."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from memladder.core.record import Source
from memladder.meter.outside.sampler import Sampler
from memladder.meter.outside.samples import Span


def test_a_still_reading_waits_for_no_thread() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        # Not entered: as on a machine that is so busy that neither thread has run yet.
        sampler = Sampler(os.getpid(), None, lambda *_: None)
        start = time.monotonic_ns()
        sampler.read_still()
        span = Span("weights", start, time.monotonic_ns())
        assert sampler.error is None
        use = sampler.samples.phase(span, start, Source.PSS)
    finally:
        child.communicate()
    assert use.polls >= 2
    assert use.peak_bytes > 0
    assert use.rss_peak_bytes > 0


def test_what_a_still_reading_raises_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(os.getpid(), None, lambda *_: None)

    def refuse(_: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("memladder.core.processes.resident", refuse)
    sampler._pids = (os.getpid(),)
    sampler.read_still()
    assert str(sampler.error) == "not yours"
