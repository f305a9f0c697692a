"""Folders that are lists: one file an entry, the file's name its key."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable


def entries(path: Iterable[str]) -> tuple[str, ...]:
    """Keys of a package's files, sorted, none of them imported; `path` is its `__path__`.

    A name that begins with an underscore is no entry: entries share what is there.
    """
    found = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in found if not name.startswith("_")))
