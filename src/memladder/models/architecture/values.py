"""The values of a `config.json` under the names that families gave them, defaults filled in.

Defaults and aliases are transformers' own, kept as data: `defaults.json` names the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from memladder.core.errors import ConfigError

_LARGEST = 1 << 31
# Families that transformers does not have, by the one that they are spelt like.
_ALIASES = {"kimi_k2": "deepseek_v3", "deepseek": "deepseek_v2", "mistral3_text": "mistral"}


@cache
def _defaults() -> Mapping[str, Any]:
    text = resources.files(__package__).joinpath("defaults.json").read_text("utf-8")
    found: Mapping[str, Any] = json.loads(text)["families"]
    return found


def families() -> tuple[str, ...]:
    """Families whose defaults are known."""
    return tuple(_defaults())


class Values:
    """What a configuration says, and what its family supposes where it says nothing.

    >>> Values({"model_type": "bloom", "n_head": 112}).size("num_attention_heads")
    112
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.family = str(raw.get("model_type"))
        known = _defaults().get(_ALIASES.get(self.family, self.family), {})
        names: Mapping[str, str] = known.get("names", {})
        self._names = {**names, **{held: name for name, held in names.items()}}
        self._raw = raw
        self._given = known.get("values", {})

    def get(self, *names: str) -> Any:
        """The first of `names` that the file gives, else that the family supposes, else None."""
        for values in (self._raw, self._given):
            for name in names:
                for spelling in (name, self._names.get(name)):
                    if spelling and values.get(spelling) is not None:
                        return values[spelling]
                if values is self._raw and name in values:
                    return None  # the file says null, which is no default
        return None

    def said(self, *names: str) -> Any:
        """As `get`, of the file alone."""
        return next((self._raw[name] for name in names if self._raw.get(name) is not None), None)

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number above 0. Raises ConfigError naming the field."""
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if value is None:
            raise ConfigError(f"{names[0]} is missing")
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise ConfigError(f"{names[0]} {str(value)[:40]!r} is not a whole number above 0")
        return value

    def count(self, *names: str) -> int:
        """A whole number, 0 where there is none."""
        value = self.get(*names)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
            raise ConfigError(f"{names[0]} {str(value)[:40]!r} is not a whole number")
        return value

    def switch(self, name: str | bool) -> bool:
        """A flag by its name, or as it is."""
        if isinstance(name, bool):
            return name
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name} {str(value)[:40]!r} is not true or false")
        return bool(value)
