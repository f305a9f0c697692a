"""A case's log: what its workers print, the beginning and the end where that is too much.

Workers write to a pipe, which a thread of the runner copies: a worker can fill no disk, and the log
may be removed meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from memladder.core import files
from memladder.core.text import clean
from memladder.core.units import MIB

# Of all workers of a case together, and of each worker's end.
HEAD_BYTES = 16 * MIB
TAIL_BYTES = MIB
_CHUNK = 1 << 16
# A pipe holds less (pipe(7)); whoever still writes after the end writes in vain.
_MOST_LEFT = 16 * _CHUNK


class Log:
    """The file of a case's log, started anew. Raises UsageError where it can't be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.room = HEAD_BYTES
        self._file = files.open_log(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def write(self, data: bytes) -> None:
        """Append. A full disk loses the log, not the case: the record says what matters."""
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._file, data) :]


class Output:
    """What one worker prints, on its way to the log. `pipe` is for the worker to write to."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._from, self.pipe = os.pipe()
        self._stopped, self._stop = os.pipe()
        self._last: deque[bytes] = deque()
        self._kept = 0
        self._unwritten = 0
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """For when the worker is gone: what is in the pipe by now is the last of it."""
        os.close(self.pipe)
        os.close(self._stop)
        self._thread.join()
        os.close(self._from)
        os.close(self._stopped)
        rest = self.end()[-self._unwritten :] if self._unwritten else b""
        if self._unwritten > len(rest):
            self._log.write(b"\n[%d bytes are left out here]\n" % (self._unwritten - len(rest)))
        self._log.write(rest)

    def end(self) -> bytes:
        """The last bytes that were printed, 1 MiB at most."""
        return b"".join(self._last)[-TAIL_BYTES:]

    def last_words(self) -> str:
        """The last line with ink; a crash's stack is passed over."""
        text = self.end().decode(errors="replace").partition("Fatal Python error: ")[0]
        lines = (clean(line) for line in reversed(text.splitlines()))
        return next((line for line in lines if line), "")

    def _copy(self) -> None:
        while True:
            ready, _, _ = select.select([self._from, self._stopped], [], [])
            if self._stopped in ready:
                break
            data = os.read(self._from, _CHUNK)
            if not data:
                return
            self._keep(data)
        os.set_blocking(self._from, False)
        left = _MOST_LEFT
        with contextlib.suppress(BlockingIOError):
            while left > 0 and (data := os.read(self._from, _CHUNK)):
                left -= len(data)
                self._keep(data)

    def _keep(self, data: bytes) -> None:
        head = data[: self._log.room]
        self._log.write(head)
        self._log.room -= len(head)
        self._unwritten += len(data) - len(head)
        self._last.append(data)
        self._kept += len(data)
        while self._kept - len(self._last[0]) >= TAIL_BYTES:
            self._kept -= len(self._last.popleft())
