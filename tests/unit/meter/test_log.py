"""Logs: bounded, said to be, and never anybody else's file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from memladder.core.errors import UsageError
from memladder.core.units import MIB
from memladder.meter.outside import log as logs
from memladder.meter.outside.log import Log, Output


def printed(path: Path, *chunks: bytes) -> str:
    """What becomes of a worker's output in the log; its last words."""
    with Log(path) as log:
        with Output(log) as output:
            for chunk in chunks:
                while chunk:
                    chunk = chunk[os.write(output.pipe, chunk) :]
        return output.last_words()


def test_everything_is_kept_up_to_the_bound(tmp_path: Path) -> None:
    assert printed(tmp_path / "new" / "case.log", b"one\n", b"two\n \n") == "two"
    assert (tmp_path / "new" / "case.log").read_bytes() == b"one\ntwo\n \n"


def test_beyond_the_bound_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    line = b"x" * 1023 + b"\n"
    count = 40 * 1024
    path = tmp_path / "case.log"
    assert printed(path, b"first\n", line * count, b"the last words\n") == "the last words"
    text = path.read_bytes()
    left_out = len(line) * count + len(b"first\nthe last words\n") - 17 * MIB
    note = b"\n[%d bytes are left out here]\n" % left_out
    assert len(text) == 17 * MIB + len(note)
    assert text.startswith(b"first\n")
    assert text.endswith(b"the last words\n")
    assert text[16 * MIB :].startswith(note)


def test_workers_of_a_case_share_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "HEAD_BYTES", 10)
    monkeypatch.setattr(logs, "TAIL_BYTES", 4)
    with Log(tmp_path / "case.log") as log:
        for text in (b"12345678", b"abcdefgh"):
            with Output(log) as output:
                os.write(output.pipe, text)
    assert (tmp_path / "case.log").read_bytes() == b"12345678ab\n[2 bytes are left out here]\nefgh"


def test_a_crashs_stack_is_passed_over(tmp_path: Path) -> None:
    stack = b"Fatal Python error: Segmentation fault\n\nCurrent thread:\n  File x, line 1\n"
    assert printed(tmp_path / "case.log", b"the reason\n", stack) == "the reason"


def test_last_words_are_cleaned(tmp_path: Path) -> None:
    assert printed(tmp_path / "case.log", b"\x1b[2J\x1b]0;me\x07bad\t\xff\n") == "bad \ufffd"


def test_somebody_who_keeps_the_pipe_open_is_not_waited_for(tmp_path: Path) -> None:
    with Log(tmp_path / "case.log") as log:
        with Output(log) as output:
            kept = os.dup(output.pipe)
            os.write(kept, b"said\n")
        assert output.last_words() == "said"
    os.close(kept)


def test_a_folder_that_is_removed_meanwhile_does_no_harm(tmp_path: Path) -> None:
    with Log(tmp_path / "log" / "case.log") as log:
        shutil.rmtree(tmp_path / "log")
        with Output(log) as output:
            os.write(output.pipe, b"said\n")
        assert output.last_words() == "said"


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "device", "folder", "hard link"])
def test_only_a_regular_file_of_its_own_is_written(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "target", tmp_path / "case.log"
    if kind != "dangling":
        target.write_text("precious")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "folder":
        path.mkdir()
    else:
        path.hardlink_to(target)
    with pytest.raises(UsageError, match=r"cannot write .*case\.log: "):
        Log(path)
    assert kind == "dangling" or target.read_text() == "precious"
    assert target.exists() == (kind != "dangling")
