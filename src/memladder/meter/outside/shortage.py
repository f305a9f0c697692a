"""When memory runs short: does the case need too much, `oom`, or do others hold it, `busy`?

`oom` is final and drawn, so it is said only where the case's own bytes explain it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memladder.core.host import HostMemory, HostUse
from memladder.core.processes import Resident, others
from memladder.core.units import MIB, format_bytes

# Others that hold less than this share of memory leave enough for the answer to be the case's own.
_OTHERS_SHARE = 0.25
# Page tables, pinned and shared memory of the case look like others', and are no more than this.
_MARGIN = 0.05
_NEARLY_FULL = 0.85
_NAMED = 3
_WORTH_A_NAME = 64 * MIB


@dataclass(frozen=True)
class Shortage:
    """Bytes of the case and of everybody else, of `limit` in all; `others_grew` since it began."""

    own: int
    others: int
    limit: int
    others_grew: int = 0

    @property
    def is_own(self) -> bool:
        """Where memory is full: is it for the case's own sake?"""
        grew = self.others_grew > _MARGIN * self.limit
        return not grew and self.others <= _OTHERS_SHARE * self.limit

    def explains(self, asked: int | None) -> bool:
        """Where an allocation, of `asked` bytes if that is told, failed: was it too large itself?

        It was where it had not fitted beside nobody, and where what others hold leaves room for it.
        """
        wanted = self.own + (asked or 0)
        if wanted > self.limit or wanted + self.others <= _NEARLY_FULL * self.limit:
            return True
        share = _OTHERS_SHARE if asked is None else _MARGIN
        return self.others <= share * self.limit


@dataclass(frozen=True)
class Breach:
    """Why a case must be ended for host memory's sake, and the bytes that it then held."""

    reason: str
    own: int
    is_own: bool


class HostGuard:
    """Says when a case must be ended because host memory is short, and whose bytes they are."""

    def __init__(self, host: HostMemory, fraction: float, case_bytes: int | None) -> None:
        """Before the case begins."""
        self._host = host
        self._fraction = fraction
        self._case_bytes = case_bytes
        self._before = {use.limit: use.used for use in host.read_all()}
        self.fullest = 0.0
        self.shortage = Shortage(0, 0, 1)

    def breach(self, held: Resident, mine: Iterable[int]) -> Breach | None:
        """Why the case, whose processes are `mine`, must end now; None if it need not."""
        use = self._host.read()
        short = self._shortage(use, held.private)
        if use.fraction >= self.fullest:
            self.fullest, self.shortage = use.fraction, short
        if self._case_bytes is not None and held.rss > self._case_bytes:
            reason = (
                f"the case held {format_bytes(held.rss)} of host memory; "
                f"its limit is {format_bytes(self._case_bytes)}"
            )
            return Breach(reason, held.rss, is_own=True)
        if use.fraction <= self._fraction:
            return None
        reason = (
            f"host memory: {format_bytes(use.used)} of {format_bytes(use.limit)} were in use, "
            f"{format_bytes(held.rss)} of it by the case; the limit is {self._fraction:.0%}"
        )
        was_full = self._before.get(use.limit, 0) > self._fraction * use.limit
        if short.is_own and not was_full:
            return Breach(reason, held.private, is_own=True)
        return Breach(f"{reason}; {who_holds(mine)}", held.private, is_own=False)

    def now(self, held: Resident) -> Shortage:
        """Who holds host memory at this moment."""
        return self._shortage(self._host.read(), held.private)

    def _shortage(self, use: HostUse, own: int) -> Shortage:
        held_by_others = max(use.used - own, 0)
        grew = held_by_others - self._before.get(use.limit, 0)
        return Shortage(own, held_by_others, use.limit, others_grew=max(grew, 0))


def who_holds(mine: Iterable[int]) -> str:
    """The largest processes beside `mine`, in words."""
    found = [one for one in others(mine) if one.private >= _WORTH_A_NAME][:_NAMED]
    if not found:
        return "no process that can be seen here holds it"
    return "others: " + ", ".join(
        f"{one.name} ({one.pid}) {format_bytes(one.private)}" for one in found
    )
