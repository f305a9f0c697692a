import pytest

from memladder.core.devices import UNKNOWN
from memladder.core.errors import RecordError
from memladder.core.record import Source
from memladder.core.units import GIB, MIB
from memladder.meter.outside.samples import MAX_TRACE, PageCount, Samples, Span

MS = 1_000_000


def samples(idle: int | None = None, ours: int = UNKNOWN, total: int = UNKNOWN) -> Samples:
    """Polls every 10 ms of 1 ms each, over a second; RSS counts up by 1 MiB a poll."""
    made = Samples(idle=idle)
    for i in range(100):
        made.polls.add(i * 10 * MS, (i * 10 + 1) * MS, (100 + i) * MIB, ours, total)
        made.counts.append(
            PageCount(
                (i * 10 + 2) * MS, (i * 10 + 7) * MS, (90 + i) * MIB, 80 * MIB, (100 + i) * MIB
            )
        )
    return made


def test_a_phase_takes_only_readings_that_lie_within_it() -> None:
    use = samples().phase(Span("weights", 100 * MS, 205 * MS), 0, Source.PSS)
    # Polls at 100, 110, …, 200 ms; counts up to the one of 192 to 197 ms.
    assert use.polls == 11
    assert use.rss_peak_bytes == 120 * MIB
    assert (use.peak_bytes, use.end_bytes) == (109 * MIB, 109 * MIB)
    assert use.pss_missed_bytes == 1 * MIB
    assert (use.start_s, use.end_s) == (0.1, 0.205)
    assert use.device_peak_bytes is None


def test_a_poll_that_ends_in_the_next_phase_belongs_to_neither() -> None:
    made = samples()
    early = made.polls.within(Span("a", 100 * MS, 150 * MS + MS // 2))
    late = made.polls.within(Span("b", 150 * MS + MS // 2, 200 * MS + MS))
    assert list(early) == [10, 11, 12, 13, 14]
    assert list(late) == [16, 17, 18, 19, 20]


def test_a_phase_without_a_reading_is_refused() -> None:
    with pytest.raises(RecordError, match="'context' ended before its memory could be read"):
        samples().phase(Span("context", 101 * MS, 105 * MS), 0, Source.PSS)


def test_a_device_phase_reads_the_tree_and_the_total() -> None:
    made = samples(idle=GIB, ours=500 * MIB, total=3 * GIB)
    assert made.source() is Source.NVML_PROCESS
    use = made.phase(Span("steady", 0, 1000 * MS), 0, made.source())
    assert use.peak_bytes == use.end_bytes == use.device_peak_bytes == 500 * MIB
    assert use.device_total_peak_bytes == 3 * GIB
    assert use.pss_peak_bytes == 189 * MIB


@pytest.mark.parametrize("ours", [UNKNOWN, 0])
def test_without_bytes_per_process_the_delta_is_used_and_labelled(ours: int) -> None:
    made = samples(idle=GIB, ours=ours, total=3 * GIB)
    assert made.source() is Source.NVML_DEVICE_DELTA
    use = made.phase(Span("steady", 0, 1000 * MS), 0, made.source())
    assert use.peak_bytes == use.device_peak_bytes == 2 * GIB


def test_one_untold_poll_makes_the_whole_run_a_delta() -> None:
    made = samples(idle=GIB, ours=500 * MIB, total=3 * GIB)
    made.polls.add(1000 * MS, 1001 * MS, 1, UNKNOWN, 3 * GIB)
    assert made.source() is Source.NVML_DEVICE_DELTA


def test_the_longest_gap_is_between_starts() -> None:
    made = samples()
    made.polls.add(1500 * MS, 1501 * MS, 1, UNKNOWN, UNKNOWN)
    assert made.longest_gap_ns(range(101)) == 510 * MS
    assert made.longest_gap_ns(range(100)) == 10 * MS


def test_the_trace_keeps_what_moved_and_the_edges() -> None:
    made = Samples()
    made.counts.append(PageCount(0, MS, 50 * MIB, 1, 1))
    for i in range(1, 1001):
        rss = 100 * MIB if i < 500 else 200 * MIB
        made.polls.add(i * 5 * MS, i * 5 * MS + 1, rss, UNKNOWN, UNKNOWN)
    spans = [Span("weights", 0, 4000 * MS), Span("steady", 4000 * MS, 5100 * MS)]
    trace = made.trace(spans, Source.PSS)
    assert [point.s for point in trace] == [0.005, 2.5, 3.995, 4.0, 5.0]
    assert [point.rss_bytes // MIB for point in trace] == [100, 200, 200, 200, 200]


def test_a_restless_trace_is_thinned_to_its_bound() -> None:
    made = Samples()
    made.counts.append(PageCount(0, MS, 50 * MIB, 1, 1))
    for i in range(1, 20_001):
        made.polls.add(i * 5 * MS, i * 5 * MS + 1, (100 + i % 50) * MIB, UNKNOWN, UNKNOWN)
    trace = made.trace([Span("steady", 0, 200_000 * MS)], Source.PSS)
    assert 2 <= len(trace) <= MAX_TRACE
