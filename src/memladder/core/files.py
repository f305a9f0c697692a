"""Files: reading those that a user names, and writing so that a reader sees the old one or the new
one, never half of either."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from memladder.core.errors import LockedError, MemladderError, UsageError
from memladder.core.text import shown

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a pipe of that name would wait for its reader.
_LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_regular(
    path: Path, most_bytes: int | None = None, error: type[MemladderError] = UsageError
) -> BinaryIO:
    """A regular file, open for reading: the only way in which a file that a user names is opened.

    Never waits, and never reads without an end: a pipe, a device, a folder and a file of more than
    `most_bytes` are refused before a byte is read. Links are followed, as a user expects of what he
    names. Raises `error`, one line: `PATH: no such file`, `PATH: not a file, but a pipe`, `PATH: 12
    bytes; 8 are the most`, or the system's reason.
    """
    try:
        # Without NONBLOCK, to open a pipe waits for its other end.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise error(f"{_shown(path)}: no such file") from None
    except OSError as reason:
        raise error(f"{_shown(path)}: {reason.strerror or reason}") from None
    except ValueError:
        # A null character, or one that the file system's encoding lacks.
        raise error(f"{_shown(path)}: no file can have that name") from None
    found = os.fstat(file)
    refusal = None
    if not stat.S_ISREG(found.st_mode):
        refusal = f"not a file, but {_kind(found.st_mode)}"
    elif most_bytes is not None and found.st_size > most_bytes:
        refusal = f"{found.st_size:,} bytes; {most_bytes:,} are the most"
    if refusal is not None:
        os.close(file)
        raise error(f"{_shown(path)}: {refusal}")
    return os.fdopen(file, "rb")


def read_regular(path: Path, most_bytes: int, error: type[MemladderError] = UsageError) -> bytes:
    """All of a regular file of `most_bytes` at the most. Raises as `open_regular` does."""
    with open_regular(path, most_bytes, error) as file:
        try:
            found = file.read(most_bytes + 1)
        except OSError as reason:
            raise error(f"{_shown(path)}: {reason.strerror or reason}") from None
    if len(found) > most_bytes:
        # It grew meanwhile.
        raise error(f"{_shown(path)}: more than {most_bytes:,} bytes")
    return found


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


def _shown(path: Path) -> str:
    """A name that stays one line: it may be long, or hold what a terminal obeys."""
    text = shown(path)
    return text if len(text) <= 300 else f"{text[:140]} … {text[-140:]}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it.

    Raises UsageError, one line, when the folder is not writable or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    require_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What a killed process of the same number has left.
            temporary.unlink(missing_ok=True)
            with open_new(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def require_replaceable(path: Path) -> None:
    """Raise UsageError where a file of that name would take the place of something that is none."""
    kind = None
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        kind = None if stat.S_ISREG(mode) else _kind(mode)
    if kind is not None:
        raise UsageError(f"cannot write {_shown(path)}: it is {kind}")


def open_new(path: Path) -> BinaryIO:
    """A file to write to that was not there, and is no link. Raises FileExistsError, OSError."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb")


def open_log(path: Path) -> int:
    """A descriptor that appends to an empty regular file, made or emptied, its folder too.

    A link, a pipe or a device is left alone. Raises UsageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, _LOG, 0o666)
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror or error
        raise UsageError(f"cannot write {path}: {reason}") from None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise UsageError(f"cannot write {path}: it is not a regular file of its own")
    os.ftruncate(file, 0)
    return file


@contextmanager
def locked(path: Path, busy: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock, kept in a file of its own. Raises LockedError with the text `busy` where another
    process holds it `patience_s` later, and UsageError where the file can't be made."""
    # Not above: what a framework's environment imports is the standard library alone.
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        raise LockedError(busy) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot lock {path}: {reason}") from None
    try:
        yield
    finally:
        lock.release()


def own_folder(path: Path) -> Path:
    """A folder, made if it is not there, that no other user can write. Raises UsageError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make folder {path}: {error.strerror or error}") from None
    require_own(path, path)
    return path


def require_own(path: Path, top: Path) -> None:
    """Raise UsageError where `path`, or a folder between it and `top`, which is one of its parents,
    could have been written by another user than this one and root."""
    for one in (path, *path.parents[: len(path.relative_to(top).parts)]):
        found = one.lstat()
        if found.st_uid not in (0, os.geteuid()):
            raise UsageError(
                f"{one} belongs to user {found.st_uid}, so it is not used; remove it, or check "
                f"what it holds, then: chown {os.geteuid()} {one}"
            )
        shared = not stat.S_ISLNK(found.st_mode) and found.st_mode & _OTHERS_WRITE
        if shared and not found.st_mode & stat.S_ISVTX and not _only_ours(found):
            mode = stat.S_IMODE(found.st_mode)
            raise UsageError(
                f"{one} can be written by other users (mode {mode:o}), so it is not used; "
                f"check what it holds, then: chmod go-w {one}"
            )


def _only_ours(found: os.stat_result) -> bool:
    """Can the group alone write, and is it this user's own? Debian's umask 002 makes such files."""
    if found.st_mode & stat.S_IWOTH:
        return False
    if found.st_gid == 0:
        return True
    try:
        group, user = grp.getgrgid(found.st_gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name) and not group.gr_mem


def writable_folder(path: Path) -> Path:
    """`path` as a folder that exists and takes files. Raises UsageError if it does not."""
    probe = path / f".memladder.{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)
        with open_new(probe) as file:
            file.write(b"\0")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write into folder {path}: {error.strerror or error}") from None
    return path


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all went well, and is removed otherwise. Raises UsageError,
    one line, where it can't be written."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if out.exists():
            out.rmdir()
        part.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
