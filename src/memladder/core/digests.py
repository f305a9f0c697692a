"""The SHA-256 of a file in another one beside it, `NAME.sha256`, which `sha256sum --check` reads.

With the digest stands what the file system told of the file when all of it was last found to have
that digest: its size, times and inode. While these are the same, a check reads nothing of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from pathlib import Path

from memladder.core.errors import FormatError, MemladderError
from memladder.core.files import open_new, open_regular, read_regular
from memladder.core.text import shown

SUFFIX = ".sha256"
_TEXT = re.compile(rb"([0-9a-f]{64})  [^\n]+\n(?:# last read whole: ([0-9 ]{1,100})\n)?")
_MOST_BYTES = 4096
_READ = 1 << 20
# Writes within one tick of the file system's clock leave the same time.
_TICK_S = 0.02


class Digest:
    """The SHA-256 of a file while it is written: so far as it is there, it is read in order, which
    costs no disk."""

    def __init__(self, file: int) -> None:
        self._file, self._end, self._found = file, 0, hashlib.sha256()

    def up_to(self, end: int) -> None:
        """The file is complete up to that byte."""
        while part := os.pread(self._file, min(_READ, end - self._end), self._end):
            self._found.update(part)
            self._end += len(part)

    def hex(self) -> str:
        """Of what there was up to now."""
        return self._found.hexdigest()


def of(path: Path) -> str:
    """SHA-256 of all of a file, in hexadecimal digits. Raises FormatError where it can't be."""
    found = hashlib.sha256()
    with open_regular(path, error=FormatError) as file:
        try:
            while part := file.read(_READ):
                found.update(part)
        except OSError as error:
            raise FormatError(f"{shown(path)}: {error.strerror or error}") from None
    return found.hexdigest()


def beside(path: Path) -> Path:
    """Where a file's digest is kept."""
    return path.with_name(path.name + SUFFIX)


def note(path: Path, sha256: str) -> None:
    """Keep the digest of a file that stands there whole. Raises OSError."""
    fresh = time.time() - path.stat().st_mtime
    if 0 <= fresh < _TICK_S:
        time.sleep(_TICK_S - fresh)
    _write(path, sha256, _stamp(path))


def moved(part: Path, path: Path) -> None:
    """Let a file take its place, with its digest; what is not known yet is computed."""
    sha256 = noted(part) or of(part)
    part.replace(path)
    beside(part).unlink(missing_ok=True)
    note(path, sha256)


def noted(path: Path) -> str | None:
    """The digest that is kept for a file; None where there is none."""
    found = _kept(path)
    return None if found is None else found[0]


def fault(path: Path, sha256: str | None = None, *, full: bool = False) -> str | None:
    """What is wrong with a file, in words that follow its name; None where it is as written.

    `sha256` is the digest that it has to have, by default the one that is kept. All of it is read
    where the file system tells something else of it than last time, and where `full` is asked for.
    """
    kept = _kept(path)
    wanted = sha256 or (kept[0] if kept else None)
    if wanted is None:
        return f"has no {beside(path).name} beside it"
    try:
        stamp = _stamp(path)
        if not full and kept == (wanted, stamp):
            return None
        found = of(path)
    except (OSError, MemladderError) as error:
        return f"can't be read ({getattr(error, 'strerror', None) or error})"
    if found != wanted:
        return "is not as it was written: its SHA-256 differs"
    # What can't be kept, as in a folder that is read only, is read whole again the next time.
    with contextlib.suppress(OSError):
        if kept != (wanted, stamp) and _stamp(path) == stamp:
            _write(path, wanted, stamp)
    return None


def require(path: Path, sha256: str | None = None, *, full: bool = False) -> None:
    """Raise FormatError, one line, for a file of the user's that is not as it was written.

    One without a digest is taken, and that it was not checked is said on stderr.
    """
    if sha256 is None and noted(path) is None:
        if path.is_file():
            sys.stderr.write(f"{shown(path)} is not checked: no {beside(path).name} beside it\n")
        return
    found = fault(path, sha256, full=full)
    if found is not None:
        raise FormatError(f"{shown(path)} {found}")


def _stamp(path: Path) -> str:
    found = path.stat()
    numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return " ".join(map(str, numbers))


def _kept(path: Path) -> tuple[str, str] | None:
    try:
        text = read_regular(beside(path), _MOST_BYTES)
    except MemladderError:
        return None
    found = _TEXT.fullmatch(text)
    return None if found is None else (found[1].decode(), (found[2] or b"").decode())


def _write(path: Path, sha256: str, stamp: str) -> None:
    name = f".{beside(path).name}.{os.getpid()}.{threading.get_ident()}.tmp"
    part = path.with_name(name)
    part.unlink(missing_ok=True)
    try:
        with open_new(part) as file:
            file.write(os.fsencode(f"{sha256}  {path.name}\n# last read whole: {stamp}\n"))
        part.replace(beside(path))
    finally:
        part.unlink(missing_ok=True)
