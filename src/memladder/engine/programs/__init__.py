"""How each model's layer is computed. One file a model; the file's name is the model's key.

A file defines `matrices`, `vectors` and `constants` (what the packed layer holds, and where a
checkpoint has it), `program` (the steps), and `STORED` (for the reference: what they keep).
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from memladder.errors import UsageError

_NOT_MODELS = {"build"}


def names() -> tuple[str, ...]:
    """Keys of the models that the engine runs, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(set(found) - _NOT_MODELS))


def definition(model: str) -> ModuleType:
    """The file of that model. Raises UsageError for one that the engine does not run."""
    if model not in names():
        raise UsageError(f"the engine has no program for {model!r}; it has: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{model}")
