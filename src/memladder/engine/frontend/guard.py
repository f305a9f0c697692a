"""The outer boundary of what reads a graph: whatever it holds, the user has one line of it.

A known fault is told where it is known, by a GraphError or LayoutError. An unknown one, an
index beyond an axis or a number that is none, is told here by the node's name and the exception's,
which stays the line's cause for who looks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memladder.core.errors import GraphError
from memladder.engine.frontend.axes import LayoutError
from memladder.engine.frontend.positions import PositionError


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Raise GraphError in the name of `what` for anything that fails inside."""
    try:
        yield
    except (LayoutError, PositionError) as error:
        raise GraphError(f"{what}: {error}") from None
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
        *(RecursionError, TypeError, ValueError),
    ) as error:
        reason = " ".join(str(error).split())[:160] or "no more is known"
        raise GraphError(
            f"{what} does not fit what it is given ({type(error).__name__}: {reason})"
        ) from error
