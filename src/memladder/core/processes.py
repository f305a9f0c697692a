"""Processes as Linux's /proc shows them: who descends from whom, and the memory that they hold.

Standard library only, because the guard runs it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Kernels built without CONFIG_PROC_CHILDREN have no list of children; there /proc is scanned.
_LISTS_CHILDREN = Path("/proc/thread-self/children").exists()
# Linux before 4.14 and gVisor have no rollup; the sum over `smaps` is the same number.
_SMAPS = "smaps_rollup" if Path("/proc/self/smaps_rollup").exists() else "smaps"


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
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


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
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return None


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
