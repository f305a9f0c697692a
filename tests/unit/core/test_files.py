import errno
import os
from pathlib import Path

import pytest

from memladder.core import files
from memladder.core.errors import LockedError, UsageError
from memladder.core.files import (
    locked,
    own_folder,
    require_own,
    writable_folder,
    write_atomic,
)


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write .*record\.json: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_file_in_the_way_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot write into folder"):
            writable_folder(path)


def test_a_link_in_the_way_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / f".record.json.{os.getpid()}.tmp").symlink_to(tmp_path / "target")
    (tmp_path / f".memladder.{os.getpid()}.tmp").symlink_to(tmp_path / "target")
    write_atomic(writable_folder(tmp_path) / "record.json", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "record.json").read_text() == "new"
    assert not (tmp_path / "record.json").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "record.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(UsageError, match=rf"cannot write .*record\.json: it is a {kind}"):
        write_atomic(path, "new")
    assert not path.is_file()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_no_file_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").write_text("precious")
    path = tmp_path / ".lock"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match=r"cannot lock .*\.lock: "), locked(path, "busy"):
        pass
    assert (tmp_path / "target").read_text() == "precious"


def test_a_lock_that_is_held_says_so(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "busy"), pytest.raises(LockedError, match="busy"), locked(path, "busy"):
        pass
    with locked(path, "busy"):
        pass


@pytest.fixture
def nest(tmp_path: Path) -> Path:
    """A file below two folders that are this user's alone."""
    path = tmp_path / "top" / "inner" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("")
    for one, mode in ((path, 0o644), (path.parent, 0o755), (path.parents[1], 0o700)):
        one.chmod(mode)
    return path


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o757, 0o775, 0o777])
def test_what_others_could_have_written_is_refused(
    nest: Path, level: int, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = nest.parents[1]
    require_own(nest, top)
    one = (nest, *nest.parents)[level]
    one.chmod(mode)
    # A group that others are in.
    monkeypatch.setattr(files, "_only_ours", lambda _: False)
    with pytest.raises(UsageError, match=f"{one} can be written by other users .mode {mode:o}"):
        require_own(nest, top)


def test_what_lies_above_does_not_count_and_a_sticky_folder_is_safe(nest: Path) -> None:
    nest.parents[2].chmod(0o777)
    nest.parent.chmod(0o1777)
    require_own(nest, nest.parents[1])


def test_somebody_elses_file_is_refused(nest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.lstat

    def theirs(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result((*found[:4], 4242, *found[5:])) if path == nest else found

    monkeypatch.setattr(Path, "lstat", theirs)
    with pytest.raises(UsageError, match=f"{nest} belongs to user 4242"):
        require_own(nest, nest.parents[1])


def test_a_new_folder_is_this_users_alone(tmp_path: Path) -> None:
    made = own_folder(tmp_path / "new" / "triton")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o777)
    with pytest.raises(UsageError, match="can be written by other users"):
        own_folder(made)
