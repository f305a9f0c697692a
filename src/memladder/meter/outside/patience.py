"""Waiting for memory that others hold, and trying a case again when they have let go of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from memladder.core.devices import Device
from memladder.core.host import HostMemory
from memladder.core.record import Status
from memladder.core.units import format_bytes
from memladder.meter.outside.log import Log
from memladder.meter.outside.shortage import who_holds
from memladder.meter.outside.watch import Limits, Problem, Story, Watch
from memladder.meter.protocol import Order

_TRIES = 3
_LOOK_S = 0.5
_WAITING = "waiting for memory that others hold"


def watched(
    order: Order,
    limits: Limits,
    device: Device | None,
    notify: Callable[[str, int], None],
    variables: Mapping[str, str],
    log: Log,
) -> Story:
    """The story of a worker that was watched from start to end.

    One that others left no memory is tried again when there is room, `limits.patience_s` later at
    most; then its problem is `busy`.
    """
    deadline = time.monotonic() + limits.patience_s
    needed, story = 0, None
    for _ in range(_TRIES):
        problem = _wait_for_room(limits, device, needed, deadline, notify)
        if problem is not None:
            return story or Story(problem=problem)
        story = Watch(order, limits, device, notify).run(variables, log)
        if story.problem is None or story.problem.status is not Status.BUSY:
            break
        needed = story.problem.needed_bytes
    assert story is not None
    return story


def _wait_for_room(
    limits: Limits,
    device: Device | None,
    needed: int,
    deadline: float,
    notify: Callable[[str, int], None],
) -> Problem | None:
    """Wait until `needed` bytes would fit where the case takes them; why they never did."""
    host = HostMemory()
    while True:
        room = None if device is None else device.memory_bytes
        # A GPU whose memory is not told shares the host's.
        fraction, here = limits.host_fraction, needed if room is None else 0
        full = [one for one in host.read_all() if one.used + here > fraction * one.limit]
        if device is not None and room is not None and device.used_bytes() + needed > room:
            used, reason = device.used_bytes(), "device memory is in use by others"
        elif full:
            used = full[0].used
            reason = (
                f"host memory: {format_bytes(used)} of {format_bytes(full[0].limit)} were in use "
                f"before the case; the limit is {fraction:.0%}"
            )
        else:
            return None
        if time.monotonic() > deadline:
            return Problem(Status.BUSY, f"{reason}; {who_holds([os.getpid()])}")
        notify(_WAITING, used)
        time.sleep(_LOOK_S)
