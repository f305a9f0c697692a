"""Starting other programs, in this one place: none imports from the working directory.

The guard alone forks by itself (`meter.inside.guard`). Standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_START = Path(__file__).absolute().with_name("start.py")
_SAFE = {"PYTHONSAFEPATH": "1"}


def module(
    name: str,
    *arguments: str | Path,
    python: str | Path = sys.executable,
    options: Sequence[str] = (),
) -> list[str]:
    """The command that runs a module with an interpreter, 3.10 or later, as `-m` would."""
    return [str(python), *options, str(_START), name, *map(str, arguments)]


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    given: str | None = None,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its status and text. `env` is the whole environment, by default
    ours; `given` its standard input, by default none.

    Raises OSError where it can't be started, subprocess.TimeoutExpired.
    """
    return subprocess.run(
        list(command),
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        env=_environ(env),
        check=False,
    )


def start(
    command: Sequence[str],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own. Raises OSError where it can't be started."""
    return subprocess.Popen(
        list(command),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=_environ(env),
        start_new_session=True,
    )


def _environ(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**(os.environ if env is None else env), **_SAFE}
