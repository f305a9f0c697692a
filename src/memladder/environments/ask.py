"""What a framework's environment has, asked from outside of it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from memladder import frameworks
from memladder.core import serial
from memladder.environments.interpreter import Interpreter, chosen, source_folder
from memladder.environments.probe import package_versions
from memladder.frameworks.base import Availability, Framework

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
    command = [str(interpreter.python), "-m", "memladder.environments.probe", module, key, device]
    try:
        # Python 3.10 looks for modules in the working directory first.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            env=interpreter.environ(),
            cwd=source_folder(),
            check=True,
        )
        return serial.from_json(Answer, json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"it exits with status {error.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it does not answer within {_PATIENCE_S:g} s"
    except (OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    refused = f"{interpreter.python} can't run workers: {reason}"
    return Answer(Availability(False, reason=refused), "unknown", {})
