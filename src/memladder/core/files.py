"""Files: reading those that a user names, and writing so that a reader sees the old one or the new
one, never half of either."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from memladder.core.errors import MemladderError, UsageError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


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
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")
        refusal = f"not a file, but {kind}"
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


def _shown(path: Path) -> str:
    """A name that stays one line: it may be long, or hold what a terminal obeys."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:140]} … {text[-140:]}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it.

    Raises UsageError, one line, when the folder is not writable or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def writable_folder(path: Path) -> Path:
    """`path` as a folder that exists and takes files. Raises UsageError if it does not."""
    probe = path / f".memladder.{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write into folder {path}: {error.strerror or error}") from None
    return path
