"""Processes as Linux's /proc shows them: who descends from whom, and the memory that they hold.

Standard library only, because the guard runs it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from memladder.core.text import clean

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Kernels built without CONFIG_PROC_CHILDREN have no list of children; there /proc is scanned.
_LISTS_CHILDREN = Path("/proc/thread-self/children").exists()
# Linux before 4.14 and gVisor have no rollup; the sum over `smaps` is the same number.
_SMAPS = "smaps_rollup" if Path("/proc/self/smaps_rollup").exists() else "smaps"


class Resident(NamedTuple):
    """Resident bytes of one process: all, and those that no file and no other process shares."""

    rss: int
    private: int


class Other(NamedTuple):
    """Somebody else's process."""

    pid: int
    name: str
    private: int


class Pages(NamedTuple):
    """Proportional and unique set size of one process, in bytes (proc(5), smaps)."""

    pss: int
    uss: int


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


class Adoption:
    """Makes this process the parent of whoever below it is orphaned, as long as anyone wants it.

    Threads may share one; `enter` and `leave` come in pairs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0

    def enter(self) -> None:
        """Adopt from now on."""
        with self._lock:
            self._wanted += 1
            prctl(PR_SET_CHILD_SUBREAPER, 1)

    def leave(self) -> None:
        """Whoever is orphaned later goes to another, once nobody else has entered."""
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                prctl(PR_SET_CHILD_SUBREAPER, 0)


ADOPTION = Adoption()


def descendants(pid: int) -> tuple[int, ...]:
    """Process ids below `pid`, which is left out itself; empty when it is gone."""
    parents = None if _LISTS_CHILDREN else _parents()
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop()
        if parents is None:
            children = _children(parent)
        else:
            children = [child for child, above in parents.items() if above == parent]
        found += children
        todo += children
    return tuple(found)


def rss(pid: int) -> int:
    """Resident bytes of a process; 0 when it is gone. The kernel's own count, not exact."""
    return resident(pid).rss


def resident(pid: int) -> Resident:
    """Resident bytes of a process; zeros when it is gone. The kernel's own counts, not exact."""
    try:
        _, rss, shared, *_ = Path(f"/proc/{pid}/statm").read_bytes().split()
    except (FileNotFoundError, ProcessLookupError):
        return Resident(0, 0)
    return Resident(int(rss) * _PAGE, (int(rss) - int(shared)) * _PAGE)


def state(pid: int) -> str | None:
    """The letter of proc(5) for what a process does, `T` where it is stopped; None when gone."""
    found = _stat(pid)
    return found[0] if found else None


def session(pid: int) -> int | None:
    """The session that a process, dead ones not reaped included, belongs to; None when gone."""
    found = _stat(pid)
    return int(found[3]) if found else None


def has_variable(pid: int, variable: str) -> bool:
    """Did a process start with `NAME=value` in its environment? False when it is gone."""
    try:
        return os.fsencode(variable) in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def others(mine: Iterable[int]) -> list[Other]:
    """Processes that are not `mine` and can be seen, the largest by private bytes first."""
    left_out = set(mine)
    pids = {int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()} - left_out
    found = [Other(pid, name(pid) or "unknown", resident(pid).private) for pid in pids]
    return sorted(found, key=lambda one: -one.private)


def pages(pid: int) -> Pages:
    """PSS and USS of a process, counted page by page: about 15 ms for each GiB of 4 KiB pages.

    Zero when the process is gone. Raises PermissionError for a process of another user.
    """
    pss = uss = 0
    try:
        with Path(f"/proc/{pid}/{_SMAPS}").open("rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    pss += int(line.split()[1])
                elif line.startswith((b"Private_Clean:", b"Private_Dirty:")):
                    uss += int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return Pages(0, 0)
    return Pages(pss << 10, uss << 10)


def name(pid: int) -> str | None:
    """A process's short name; None when it is gone or lives in another process namespace."""
    try:
        return clean(Path(f"/proc/{pid}/comm").read_text(errors="replace")) or None
    except OSError:
        return None


def _stat(pid: int) -> list[str] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in brackets, may hold anything; the state follows its last bracket.
    return stat[stat.rindex(")") + 1 :].split()


def _children(pid: int) -> list[int]:
    # A child is listed under the thread that forked it.
    children: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return children
    for thread in threads:
        try:
            children += map(int, (thread / "children").read_bytes().split())
        except OSError:
            continue
    return children


def _parents() -> dict[int, int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:
                continue
            # The name, in brackets, may hold anything; state and parent follow its last bracket.
            parents[int(entry.name)] = int(stat[stat.rindex(b")") + 1 :].split()[1])
    return parents
