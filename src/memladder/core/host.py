"""The host's memory: how much is in use, and how much may be, a container's limit included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostUse:
    """Bytes in use and bytes that there are."""

    used: int
    limit: int

    @property
    def fraction(self) -> float:
        """How full it is, from 0 to 1."""
        return self.used / self.limit


@dataclass(frozen=True)
class _Group:
    """A control group with a memory limit; the names differ between cgroup v1 and v2."""

    folder: Path
    limit_file: str
    usage_file: str
    file_pages: tuple[str, str]

    def limit(self) -> int | None:
        try:
            text = (self.folder / self.limit_file).read_text().strip()
        except OSError:
            return None
        return None if text == "max" else int(text)

    def use(self) -> HostUse | None:
        """None where the group has gone or has no limit."""
        limit = self.limit()
        if not limit:
            return None
        try:
            used = int((self.folder / self.usage_file).read_text())
            numbers = _numbers(self.folder / "memory.stat")
        except OSError:
            return None
        # Pages of files, those in use too, are given back before anything is refused; shared
        # memory is not counted among them (cgroup-v2.rst, memory.stat).
        cache = sum(numbers.get(name, 0) for name in self.file_pages)
        return HostUse(max(used - cache, 0), limit)


class HostMemory:
    """This host's memory as the processes here may use it."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is where `proc` and `sys` are found."""
        self._proc = root / "proc"
        total = self.total_bytes
        # v1 says "no limit" with a number near 2⁶³.
        self._groups = [group for group in _groups(root) if (group.limit() or total) < total]

    @property
    def total_bytes(self) -> int:
        """Memory of the machine."""
        return _numbers(self._proc / "meminfo")["MemTotal:"] << 10

    def read(self) -> HostUse:
        """Use and limit of whatever is fullest: the machine, or a control group that we are in."""
        return max(self.read_all(), key=lambda use: use.fraction)

    def read_all(self) -> list[HostUse]:
        """Use and limit of the machine, and of each control group with a limit."""
        numbers = _numbers(self._proc / "meminfo")
        total = numbers["MemTotal:"] << 10
        uses = [HostUse(total - (numbers["MemAvailable:"] << 10), total)]
        return uses + [use for group in self._groups if (use := group.use()) is not None]

    def oom_kills(self) -> int:
        """Processes that the kernel has killed for want of memory since it started."""
        return _numbers(self._proc / "vmstat").get("oom_kill", 0)


def _numbers(path: Path) -> Mapping[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {fields[0]: int(fields[1]) for fields in lines if len(fields) > 1}


def _groups(root: Path) -> list[_Group]:
    """The memory control groups that this process is in, up to the topmost that is mounted."""
    mounts = {
        "": _Group(
            root / "sys/fs/cgroup",
            "memory.max",
            "memory.current",
            ("inactive_file", "active_file"),
        ),
        "memory": _Group(
            root / "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        ),
    }
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if (top := mounts.get(controller)) is not None:
                # In a container the path may be the host's; then the mount itself is our group.
                folder = top.folder / path.lstrip("/")
                folders = [folder, *folder.parents] if folder.is_dir() else [top.folder]
                found += [
                    _Group(one, top.limit_file, top.usage_file, top.file_pages)
                    for one in folders
                    if one.is_relative_to(top.folder)
                ]
    return found
