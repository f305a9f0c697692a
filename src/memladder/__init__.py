"""Memory of LLM layers under inference frameworks: measured, explained, predicted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memladder.engine.run.layer import load_layer
    from memladder.engine.run.load import load_model

__version__ = "0.1.0"
__all__ = ["load_layer", "load_model"]
_ROOMS = {"load_layer": "layer", "load_model": "load"}


def __getattr__(name: str) -> object:
    # The engine imports torch; the command line and the published figure must start without it.
    if name in _ROOMS:
        return getattr(importlib.import_module(f"memladder.engine.run.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
