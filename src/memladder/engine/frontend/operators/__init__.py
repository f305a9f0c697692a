"""What each ONNX operator does to values: one table, a few lines an operator.

Casts between floats are left out: where values are rounded is the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping

from memladder.engine.frontend.operators import elements, products, rearrange
from memladder.engine.frontend.operators.operands import Rule

TABLE: Mapping[str, Rule] = {**rearrange.TABLE, **elements.TABLE, **products.TABLE}
"""By ONNX's names, of its own domain."""
