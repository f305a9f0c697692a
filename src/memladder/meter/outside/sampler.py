"""The sampler: reads the memory of a process tree from outside, at 100 Hz or faster.

Two threads of the runner. One polls cheap readings (RSS, NVML) at absolute deadlines. The other
counts pages for PSS, which takes about 15 ms for each GiB of 4 KiB pages, and so is done where it
tells most: when RSS is at the phase's high-water mark, at most a fifth of the time, and always once
while the worker holds still at the end of a phase.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from memladder.core import processes
from memladder.core.devices import UNKNOWN, Device, DeviceProcess
from memladder.core.processes import Resident
from memladder.meter.outside.samples import PageCount, Samples

INTERVAL_S = 0.005
_SCAN_EVERY = 10
_GUARD_EVERY = 4
# A page count may take this share of the time while RSS is at a new height, and that one else.
_EAGER_SHARE = 0.2
_IDLE_SHARE = 0.05
_EAGER_S = 0.02
_IDLE_S = 0.25
_AT_TOP = 0.998


class Sampler:
    """Reads all descendants of `root` while the `with` block lasts.

    `on_poll` is called in the polling thread, some 50 times a second, with what the tree holds and
    its process ids; what it or a reading raises ends the sampling and is kept in `error`.
    """

    def __init__(
        self, root: int, device: Device | None, on_poll: Callable[[Resident, Sequence[int]], None]
    ) -> None:
        self.samples = Samples()
        self.others: dict[int, tuple[str, int | None]] = {}
        self.error: Exception | None = None
        self._root = root
        self._device = device
        self._on_poll = on_poll
        self._pids: tuple[int, ...] = ()
        self._ever: set[int] = {root}
        self._stop = threading.Event()
        self._polling = threading.Lock()
        self._counting = threading.Lock()
        self.held = Resident(0, 0)
        self._rss_peak = 0
        self._rss_counted = 0
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (self._poll_on, self._count_on)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def current_bytes(self) -> int:
        """The latest reading: device bytes of the tree where there are any, else RSS."""
        return self.device_bytes or self.held.rss

    @property
    def device_bytes(self) -> int | None:
        """The tree's bytes on the device, as read last; None where they are not told."""
        polls = self.samples.polls
        ours = polls.ours[-1] if polls.start_ns else UNKNOWN
        return ours if ours > 0 else None

    @property
    def pids(self) -> tuple[int, ...]:
        """The tree's processes, as seen last."""
        return self._pids

    def begin_phase(self) -> None:
        """Forget the high-water mark that page counts are aimed at."""
        self._rss_peak = self._rss_counted = 0

    def read_still(self) -> None:
        """Read the tree's memory and count its pages now, for a worker that holds still.

        The threads may have had no turn since its phase began: a busy machine has others to run.
        """
        self._guarded(self._read_still)

    def _read_still(self) -> None:
        self._scan()
        self._poll()
        self._count()
        self._stop.wait(4 * INTERVAL_S)
        self._poll()

    def foreign(self) -> dict[int, tuple[str, int | None]]:
        """Others seen on the device: name and most bytes (None where not told), by pid."""
        return {pid: seen for pid, seen in self.others.items() if pid not in self._ever}

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.error = error

    def _poll_on(self) -> None:
        due = time.monotonic()
        round_ = 0
        while not self._stop.is_set():
            if round_ % _SCAN_EVERY == 0:
                self._scan()
            self._poll()
            if round_ % _GUARD_EVERY == 0:
                self._on_poll(self.held, self._pids)
            round_ += 1
            due += INTERVAL_S
            wait = due - time.monotonic()
            if wait > 0:
                self._stop.wait(wait)
            else:
                # A missed deadline is a gap in the record, not a burst of polls after it.
                due = time.monotonic()

    def _scan(self) -> None:
        # The list of children may miss one while another ends; nobody leaves the tree but by dying.
        known = [pid for pid in self._pids if processes.rss(pid)]
        self._pids = tuple({*known, *processes.descendants(self._root)})
        self._ever.update(self._pids)

    def _poll(self) -> None:
        with self._polling:
            pids = self._pids
            start = time.monotonic_ns()
            held = [processes.resident(pid) for pid in pids]
            rss = sum(one.rss for one in held)
            private = sum(one.private for one in held)
            ours = total = UNKNOWN
            if self._device is not None:
                ours, total, others = self._device.read(pids)
                for other in others:
                    self._meet(other)
            self.samples.polls.add(start, time.monotonic_ns(), rss, ours, total)
            self.held = Resident(rss, private)
            self._rss_peak = max(self._rss_peak, rss)

    def _meet(self, other: DeviceProcess) -> None:
        name, most = self.others.get(other.pid) or (other.name, None)
        if other.pid not in self.others:
            # It may be a child of the worker that has not been seen yet.
            self._scan()
        if other.used_bytes is not None:
            most = max(most or 0, other.used_bytes)
        self.others[other.pid] = name, most

    def _count_on(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            if not self.samples.counts:
                self._count()
                continue
            last = self.samples.counts[-1]
            cost = (last.end_ns - last.start_ns) / 1e9
            since = (time.monotonic_ns() - last.end_ns) / 1e9
            peak = self._rss_peak
            new_height = self.held.rss >= _AT_TOP * peak and self._rss_counted < _AT_TOP * peak
            eager = new_height and since >= max(_EAGER_S, cost * (1 / _EAGER_SHARE - 1))
            if eager or since >= max(_IDLE_S, cost * (1 / _IDLE_SHARE - 1)):
                self._count()

    def _count(self) -> None:
        with self._counting:
            before = self.held.rss
            start = time.monotonic_ns()
            found = [processes.pages(pid) for pid in self._pids]
            end = time.monotonic_ns()
            # Pages are walked in turn: only what was there from first to last is surely counted.
            rss = min(before, self.held.rss)
            pss, uss = sum(one.pss for one in found), sum(one.uss for one in found)
            if pss:
                self.samples.counts.append(PageCount(start, end, pss, uss, rss))
                self._rss_counted = max(self._rss_counted, rss)
