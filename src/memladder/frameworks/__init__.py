"""One file a framework; the file's name is its key, and this folder is the only list of them.

A file defines `FRAMEWORK`. One that runs a framework in several number formats also defines
`VARIANTS`, a framework each by what follows the file's name: `ladder_fp16_int4` is the variant
`fp16_int4` of `ladder.py`. `_shared` and `_rules` hold what files have in common.

Importing a framework's file must stay light: its libraries are imported by its session, in the
worker's process.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache

from memladder.core.errors import UsageError
from memladder.core.folders import entries
from memladder.frameworks._shared.base import Framework


def names() -> tuple[str, ...]:
    """Keys of all frameworks that this version can run, sorted."""
    return tuple(sorted(key for module in _modules() for key in _served(module)))


def get(name: str) -> Framework:
    """The framework of that key. Raises UsageError for an unknown one."""
    return _served(module(name))[name]


def module(name: str) -> str:
    """The module that serves that key. Raises UsageError for an unknown one."""
    for found in _modules():
        if name in _served(found):
            return found
    raise UsageError(f"unknown framework {name!r}; known: {', '.join(names())}")


def load(module: str, key: str) -> Framework:
    """The framework of that key in a module, which need not be of this folder."""
    served = _served(module)
    if key not in served:
        raise UsageError(f"{module} serves {', '.join(served)}, not {key!r}")
    return served[key]


@cache
def _modules() -> list[str]:
    return [f"{__name__}.{name}" for name in entries(__path__)]


def _served(module: str) -> Mapping[str, Framework]:
    loaded = importlib.import_module(module)
    own = module.rpartition(".")[2]
    variants: Mapping[str, Framework] = getattr(loaded, "VARIANTS", {})
    served = {own: loaded.FRAMEWORK} | {f"{own}_{name}": one for name, one in variants.items()}
    for framework in served.values():
        if not isinstance(framework, Framework):
            raise TypeError(f"{module}.FRAMEWORK is not a Framework")
    return served
