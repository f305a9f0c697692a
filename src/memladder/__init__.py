"""Memory of LLM layers under inference frameworks: measured, explained, predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memladder.engine.run.layer import load_layer

__version__ = "0.1.0"
__all__ = ["load_layer"]


def __getattr__(name: str) -> object:
    # The engine imports torch; the command line and the published figure must start without it.
    if name in __all__:
        from memladder.engine.run import layer

        return getattr(layer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
