"""One file a framework; the file's name is its key, and this folder is the only list of them.

Importing a framework's file must stay light: its libraries are imported by its session, in the
worker's process.
"""

from __future__ import annotations

import importlib
import pkgutil

from memladder.errors import UsageError
from memladder.frameworks.base import Framework

_NOT_FRAMEWORKS = {"base"}


def names() -> tuple[str, ...]:
    """Keys of all frameworks that this version can run, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(set(found) - _NOT_FRAMEWORKS))


def get(name: str) -> Framework:
    """The framework of that key. Raises UsageError for an unknown one."""
    if name not in names():
        raise UsageError(f"unknown framework {name!r}; known: {', '.join(names())}")
    framework = importlib.import_module(f"{__name__}.{name}").FRAMEWORK
    assert isinstance(framework, Framework)
    return framework
