"""The ledger: whatever goes in, it sums to its total or is not built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memladder.core.errors import RecordError
from memladder.core.ledger import CATEGORIES, Entry, Known, Ledger, closing, summed

_NAMES = [name for name in CATEGORIES if name != "residual"]


@given(
    st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 1 << 40)),
    st.integers(-(1 << 40), 1 << 42),
)
def test_a_closed_ledger_sums_to_the_reading(parts: dict[str, int], total: int) -> None:
    ledger = closing(total, [Entry(name, size, Known.TOLD) for name, size in parts.items()])
    assert sum(entry.nbytes for entry in ledger.entries) == ledger.total_bytes == total
    assert ledger.nbytes("residual") == total - sum(parts.values())


def test_entries_that_do_not_sum_are_refused() -> None:
    with pytest.raises(RecordError, match="entries of 3 bytes where 4 are held"):
        Ledger(4, (Entry("weights", 3, Known.TOLD),))


@pytest.mark.parametrize(
    ("category", "size", "known", "said"),
    [
        ("rest", 1, Known.TOLD, "not one of"),
        ("weights", -1, Known.TOLD, "below 0"),
        ("weights", 1.5, Known.TOLD, "no whole number"),
        ("weights", True, Known.TOLD, "no whole number"),
        ("weights", 1, Known.RESIDUAL, "can't be known"),
        ("residual", 1, Known.ASSUMED, "can't be known"),
    ],
)
def test_entries_are_checked(category: str, size: int, known: Known, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        Entry(category, size, known)


def test_a_category_stands_once() -> None:
    one = Entry("weights", 3, Known.TOLD)
    with pytest.raises(RecordError, match="weights is there more than once"):
        Ledger(6, (one, one))


def test_entries_come_in_the_order_of_the_categories() -> None:
    ledger = summed([Entry("kv_cache", 1, Known.TOLD), Entry("context", 2, Known.TOLD)])
    assert [entry.category for entry in ledger.entries] == ["context", "kv_cache"]
