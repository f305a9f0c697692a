import os
from pathlib import Path

import pytest

from memladder.core.host import HostMemory
from memladder.core.units import GIB, MIB


def machine(root: Path, available_gib: int, cgroup: str = "") -> Path:
    """A root folder whose kernel says 16 GiB in all."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {16 << 20} kB\nMemFree:        1 kB\n"
        f"MemAvailable:   {available_gib << 20} kB\nHugePages_Total:       0\n"
    )
    (root / "proc/vmstat").write_text("nr_free_pages 12\noom_kill 7\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_machine_without_groups(tmp_path: Path) -> None:
    memory = HostMemory(machine(tmp_path, 4))
    assert (memory.read().used, memory.read().limit) == (12 * GIB, 16 * GIB)
    assert memory.oom_kills() == 7


def test_the_lowest_limit_of_v2_groups_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, 12, "0::/outer/inner\n")
    top = root / "sys/fs/cgroup"
    group(top, memory__stat="")
    group(
        top / "outer",
        memory__max=f"{2 * GIB}\n",
        memory__current=f"{2 * GIB - MIB}\n",
        memory__stat=f"anon 5\ninactive_file {GIB}\n",
    )
    group(top / "outer/inner", memory__max="max\n", memory__current="1\n", memory__stat="")
    use = HostMemory(root).read()
    assert (use.used, use.limit) == (GIB - MIB, 2 * GIB)


def test_a_v1_group_counts_and_its_no_limit_does_not(tmp_path: Path) -> None:
    root = machine(tmp_path, 12, "9:name=systemd:/\n4:memory:/job\n0::/\n")
    top = root / "sys/fs/cgroup/memory"
    group(top, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    group(
        top / "job",
        memory__limit_in_bytes=str(GIB),
        memory__usage_in_bytes=str(900 * MIB),
        memory__stat=f"total_inactive_file {100 * MIB}\n",
    )
    use = HostMemory(root).read()
    assert (use.used, use.limit) == (800 * MIB, GIB)


def test_in_a_container_the_mount_itself_is_the_group(tmp_path: Path) -> None:
    root = machine(tmp_path, 12, "0::/docker/abc\n")
    group(
        root / "sys/fs/cgroup",
        memory__max=str(GIB),
        memory__current=str(GIB // 2),
        memory__stat="inactive_file 0\n",
    )
    assert HostMemory(root).read().limit == GIB


def test_the_fullest_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, 1, "0::/\n")
    group(
        root / "sys/fs/cgroup",
        memory__max=str(8 * GIB),
        memory__current=str(GIB),
        memory__stat="inactive_file 0\n",
    )
    assert HostMemory(root).read().limit == 16 * GIB


def test_this_machine_can_be_read() -> None:
    use = HostMemory().read()
    assert 0 < use.used < use.limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("stat", ["inactive_file {}\nactive_file {}\n", "active_file {1}\n"])
def test_pages_of_files_are_not_in_use(tmp_path: Path, stat: str) -> None:
    """What the kernel's memory.stat counts as file pages is given back before a refusal."""
    root = machine(tmp_path, 15, "0::/\n")
    group(
        root / "sys/fs/cgroup",
        memory__max=str(8 * GIB),
        memory__current=str(7 * GIB),
        memory__stat="anon 1\nfile 9\nshmem 7\n" + stat.format(2 * GIB, 3 * GIB),
    )
    cache = 5 * GIB if "inactive" in stat else 3 * GIB
    assert [use.used for use in HostMemory(root).read_all()] == [GIB, 7 * GIB - cache]


def test_pages_of_files_in_v1(tmp_path: Path) -> None:
    root = machine(tmp_path, 15, "4:memory:/job\n")
    group(
        root / "sys/fs/cgroup/memory/job",
        memory__limit_in_bytes=str(GIB),
        memory__usage_in_bytes=str(900 * MIB),
        memory__stat=f"active_file 5\ntotal_inactive_file {MIB}\ntotal_active_file {700 * MIB}\n",
    )
    use = HostMemory(root).read()
    assert (use.used, use.limit) == (199 * MIB, GIB)
