"""What the sampler has read of one worker, and what a phase or a trace says of it.

A reading takes time, so each has a start and an end, and belongs to a phase only if it lies within
it as a whole. Times are of CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from memladder.core.devices import UNKNOWN
from memladder.core.errors import RecordError
from memladder.core.record import PhaseUse, Source, TracePoint
from memladder.core.units import MIB

MAX_TRACE = 2000
_MOVED_BYTES = MIB
_MOVED_SHARE = 0.002


class PageCount(NamedTuple):
    """One count of all pages of the process tree; `rss_seen` is the RSS polled around it."""

    start_ns: int
    end_ns: int
    pss: int
    uss: int
    rss_seen: int


class Span(NamedTuple):
    """A phase and its time."""

    name: str
    start_ns: int
    end_ns: int


class Polls:
    """Columns of polls, 40 bytes each, so that hours of them are no burden."""

    def __init__(self) -> None:
        self.start_ns = array("q")
        self.end_ns = array("q")
        self.rss = array("q")
        self.ours = array("q")
        self.total = array("q")

    def add(self, start_ns: int, end_ns: int, rss: int, ours: int, total: int) -> None:
        """Append one poll. `ours` and `total` are `UNKNOWN` without a device."""
        # Readers take their length from `start_ns`, so it grows last.
        self.end_ns.append(end_ns)
        self.rss.append(rss)
        self.ours.append(ours)
        self.total.append(total)
        self.start_ns.append(start_ns)

    def within(self, span: Span) -> range:
        """Indices of the polls that lie within a phase."""
        first = bisect_left(self.start_ns, span.start_ns)
        last = bisect_right(self.start_ns, span.end_ns)
        while last > first and self.end_ns[last - 1] > span.end_ns:
            last -= 1
        return range(first, last)


@dataclass
class Samples:
    """All readings of one worker. `idle` is the device's used bytes before it started: None where
    there is no device, `UNKNOWN` where they are not told."""

    polls: Polls = field(default_factory=Polls)
    counts: list[PageCount] = field(default_factory=list)
    idle: int | None = None

    def source(self) -> Source:
        """Where the headline comes from: the best that was there to read. Raises RecordError."""
        if self.idle is None:
            return Source.PSS
        if UNKNOWN in self.polls.ours or not any(self.polls.ours):
            if self.idle == UNKNOWN:
                raise RecordError("the driver tells neither the device's bytes nor its processes'")
            return Source.NVML_DEVICE_DELTA
        return Source.NVML_PROCESS

    def device(self, source: Source, index: int) -> int | None:
        """Device bytes of one poll, by source; None on the CPU."""
        if source is Source.NVML_PROCESS:
            return self.polls.ours[index]
        if source is Source.NVML_DEVICE_DELTA and self.idle is not None:
            return max(self.polls.total[index] - self.idle, 0)
        return None

    def phase(self, span: Span, origin_ns: int, source: Source) -> PhaseUse:
        """One phase's use. Raises RecordError when nothing was read while it lasted."""
        polls = self.polls.within(span)
        counts = [
            one
            for one in self.counts
            if span.start_ns <= one.start_ns and one.end_ns <= span.end_ns
        ]
        if not polls or not counts:
            raise RecordError(f"phase {span.name!r} ended before its memory could be read")
        top = max(counts, key=lambda one: one.pss)
        rss_peak = max(self.polls.rss[index] for index in polls)
        device = [self.device(source, index) for index in polls]
        ours = [size for size in device if size is not None]
        return PhaseUse(
            name=span.name,
            start_s=(span.start_ns - origin_ns) / 1e9,
            end_s=(span.end_ns - origin_ns) / 1e9,
            polls=len(polls),
            peak_bytes=max(ours) if ours else top.pss,
            end_bytes=ours[-1] if ours else counts[-1].pss,
            device_peak_bytes=max(ours) if ours else None,
            device_total_peak_bytes=_known(max(self.polls.total[i] for i in polls)),
            pss_peak_bytes=top.pss,
            uss_peak_bytes=max(one.uss for one in counts),
            rss_peak_bytes=rss_peak,
            pss_missed_bytes=max(rss_peak - max(one.rss_seen for one in counts), 0),
        )

    def longest_gap_ns(self, indices: range) -> int:
        """Longest time between the starts of neighbouring polls."""
        return max((b - a for a, b in pairwise(self.polls.start_ns[i] for i in indices)), default=0)

    def trace(self, spans: Sequence[Span], source: Source) -> tuple[TracePoint, ...]:
        """Polls at which a value moved, and the first and last of each phase.

        A value has moved by 1 MiB or 0.2 %, whichever is more; by twice that, and so on, where
        more than 2000 points would be left. Between two points the earlier one holds.
        """
        whole = Span("", spans[0].start_ns, spans[-1].end_ns)
        points = self._points(self.polls.within(whole), source, whole.start_ns)
        edges = {index for span in spans for index in _edges(self.polls.within(span))}
        factor = 1
        while True:
            kept = _moved(points, edges, factor)
            if len(kept) <= MAX_TRACE:
                return kept
            factor *= 2

    def _points(self, indices: range, source: Source, origin_ns: int) -> dict[int, TracePoint]:
        """Every poll with the page count that was the latest then; none before the first count."""
        ends = [one.end_ns for one in self.counts]
        points = {}
        for index in indices:
            at = self.polls.start_ns[index]
            if latest := bisect_right(ends, at):
                points[index] = TracePoint(
                    (at - origin_ns) / 1e9,
                    self.device(source, index),
                    self.counts[latest - 1].pss,
                    self.polls.rss[index],
                )
        return points


def _known(size: int) -> int | None:
    return None if size == UNKNOWN else size


def _edges(indices: range) -> tuple[int, ...]:
    return (indices[0], indices[-1]) if indices else ()


def _moved(points: dict[int, TracePoint], edges: set[int], factor: int) -> tuple[TracePoint, ...]:
    kept: list[TracePoint] = []
    for index, point in points.items():
        if not kept or index in edges or _differs(kept[-1], point, factor):
            kept.append(point)
    return tuple(kept)


def _differs(old: TracePoint, new: TracePoint, factor: int) -> bool:
    pairs = (
        (old.device_bytes or 0, new.device_bytes or 0),
        (old.pss_bytes, new.pss_bytes),
        (old.rss_bytes, new.rss_bytes),
    )
    return any(abs(a - b) >= factor * max(_MOVED_BYTES, _MOVED_SHARE * a) for a, b in pairs)
