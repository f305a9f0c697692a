"""Which cases a sweep measures, read from what the user typed."""

from __future__ import annotations

from collections.abc import Iterable

from memladder import frameworks, models
from memladder.core.case import FIGURE_MODELS, FIGURE_SHAPES, FIGURE_SYSTEMS, Case, Workload
from memladder.core.errors import UsageError
from memladder.environments import ask
from memladder.frameworks.base import Availability


def known_frameworks() -> tuple[str, ...]:
    """The figure's systems in its order, then the other frameworks that this version can run."""
    return (*FIGURE_SYSTEMS, *(name for name in frameworks.names() if name not in FIGURE_SYSTEMS))


def title(framework: str) -> str:
    """The framework's label: the figure's own where it has one."""
    return FIGURE_SYSTEMS.get(framework) or frameworks.get(framework).title


def availability(framework: str, device: str) -> Availability:
    """Whether a known framework can run on `device` here. Raises UsageError for an unknown one."""
    if framework in frameworks.names():
        return ask.availability(framework, frameworks.get(framework), device)
    raise UsageError(f"unknown framework {framework!r}; known: {', '.join(known_frameworks())}")


def parse_models(text: str | None) -> tuple[str, ...]:
    """Comma-separated model names; None means the figure's. Raises UsageError."""
    return _parse_names("model", text, tuple(FIGURE_MODELS), models.names())


def parse_frameworks(text: str | None) -> tuple[str, ...]:
    """Comma-separated keys, or `all`; None means the figure's systems. Raises UsageError."""
    if text == "all":
        return known_frameworks()
    return _parse_names("framework", text, tuple(FIGURE_SYSTEMS), known_frameworks())


def parse_shapes(text: str | None) -> tuple[Workload, ...]:
    """Comma-separated `BATCHxSEQ`; None means the figure's three. Raises UsageError."""
    if text is None:
        return FIGURE_SHAPES
    return tuple(dict.fromkeys(Workload.parse(part) for part in _parts("shape", text)))


def select(
    model_names: Iterable[str],
    framework_names: Iterable[str],
    shapes: Iterable[Workload],
    device: str,
) -> tuple[Case, ...]:
    """The cases in the order they are measured: by model, then framework, smallest shape first."""
    in_order = sorted(shapes, key=lambda shape: shape.tokens)
    return tuple(
        Case(model, framework, shape, device)
        for model in model_names
        for framework in framework_names
        for shape in in_order
    )


def _parse_names(
    kind: str, text: str | None, default: tuple[str, ...], known: tuple[str, ...]
) -> tuple[str, ...]:
    if text is None:
        return default
    names = tuple(dict.fromkeys(_parts(kind, text)))
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return names


def _parts(kind: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{kind} list {text!r} has an empty entry")
    return parts
