"""Memory of LLM layers under inference frameworks: measured, explained, predicted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memladder.api import diff, explain, measure, sweep, table
    from memladder.engine.run.layer import load_layer
    from memladder.engine.run.load import load_model
    from memladder.paper.page import report
    from memladder.predictor.api import fit, predict

__version__ = "0.1.0"
__all__ = [
    "diff",
    "explain",
    "fit",
    "load_layer",
    "load_model",
    "measure",
    "predict",
    "report",
    "sweep",
    "table",
]
# Where each is; only what is asked for is imported.
_HOMES = {
    **dict.fromkeys(("diff", "explain", "measure", "sweep", "table"), "memladder.api"),
    "fit": "memladder.predictor.api",
    "load_layer": "memladder.engine.run.layer",
    "load_model": "memladder.engine.run.load",
    "predict": "memladder.predictor.api",
    "report": "memladder.paper.page",
}


def __getattr__(name: str) -> object:
    # The engine imports torch; the command line and the published figure must start without it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
