"""Where pip is configured to take packages from, told to uv, which does not read that."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from memladder.core import children
from memladder.core.errors import UsageError
from memladder.core.text import clean

# Options that have the same name in pip's configuration and on uv's command line.
_LISTS = ("index-url", "extra-index-url", "find-links", "constraint", "trusted-host")
# Where one of these is set, uv has been told on its own.
_OWN = (
    *("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"),
    *("UV_CONFIG_FILE", "UV_CONSTRAINT"),
)


def for_uv(python: Path) -> list[str]:
    """uv's arguments for what that Python's pip is configured for; none where uv has its own.

    A Python without pip has no such configuration. Raises UsageError where pip can't read it.
    """
    if any(name in os.environ for name in _OWN):
        return []
    try:
        done = children.run(children.module("pip", "config", "list", python=python))
    except OSError as error:
        raise UsageError(f"{python} can't be started: {error.strerror or error}") from None
    if done.returncode == 0:
        return list(_arguments(_configured(done.stdout)))
    said = clean(done.stderr)
    if said.endswith("No module named pip"):
        return []
    raise UsageError(f"pip config list exits with status {done.returncode}: {said[:300]}")


def _configured(listed: str) -> Mapping[str, str]:
    """What `pip install` takes from lines such as `global.find-links='a b'`.

    A command's section comes before the global one, a variable before both.

    >>> _configured("install.cert='b'\\n:env:.pre='1'\\nglobal.cert='a'\\nwheel.cert='c'")
    {'cert': 'b', 'pre': '1'}
    """
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name] = ast.literal_eval(value)
    return found["global"] | found["install"] | found[":env:"]


def _arguments(configured: Mapping[str, str]) -> Iterator[str]:
    for name in _LISTS:
        for value in configured.get(name, "").split():
            yield from (f"--{name}", value)
    if configured.get("no-index", "0").lower() in ("1", "true", "yes", "on"):
        yield "--no-index"
    if configured.get("extra-index-url"):
        # As pip does: the best version of all indexes, not of the first that has the package.
        yield from ("--index-strategy", "unsafe-best-match")
