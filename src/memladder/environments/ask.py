"""What a framework's environment has, asked from outside of it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from memladder import frameworks
from memladder.core import children, serial
from memladder.core.text import clean, cleaned
from memladder.environments.interpreter import Interpreter, chosen
from memladder.environments.probe import package_versions
from memladder.frameworks._shared.base import Availability, Framework

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Answer:
    """Whether a framework can run in its environment, its Python, and the versions that count."""

    availability: Availability
    python: str
    packages: Mapping[str, str]


def availability(key: str, framework: Framework, device: str) -> Availability:
    """Whether the framework can run on `device` in the environment that its workers start in."""
    interpreter = chosen(key)
    if interpreter.label is None:
        return framework.availability(device)
    return ask(interpreter, key, device).availability


def versions(key: str, framework: Framework, device: str) -> tuple[str, Mapping[str, str]]:
    """The worker's Python, and the versions of the packages that belong into the record."""
    interpreter = chosen(key)
    if interpreter.label is None:
        return platform.python_version(), package_versions(framework.packages)
    answer = ask(interpreter, key, device)
    return answer.python, answer.packages


@cache
def ask(interpreter: Interpreter, key: str, device: str) -> Answer:
    """Start the interpreter and let it answer. One that can't is an unavailable framework."""
    module = frameworks.module(key) if key in frameworks.names() else key
    command = children.module(
        "memladder.environments.probe", module, key, device, python=interpreter.python
    )
    try:
        done = children.run(command, env=interpreter.environ(), timeout_s=_PATIENCE_S)
        if done.returncode == 0:
            return serial.from_json(Answer, cleaned(serial.loads(done.stdout.splitlines()[-1])))
        lines = [line for line in map(clean, done.stderr.splitlines()) if line]
        reason = lines[-1] if lines else f"it exits with status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it does not answer within {_PATIENCE_S:g} s"
    except (OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    refused = f"{interpreter.python} can't run workers: {reason}"
    return Answer(Availability(False, reason=refused), "unknown", {})
