"""Which cases a sweep measures, read from what the user typed."""

from __future__ import annotations

from collections.abc import Iterable

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.errors import UsageError
from memladder.core.record import Status
from memladder.environments import ask
from memladder.frameworks._shared.base import Availability
from memladder.models import catalogue


def availability(framework: str, device: str) -> Availability:
    """Whether a framework can run on `device` here. Raises UsageError for an unknown one."""
    return ask.availability(framework, frameworks.get(framework), device)


def parse_models(text: str) -> tuple[str, ...]:
    """Comma-separated models: names, or paths to a `config.json`. Raises UsageError."""
    found = tuple(dict.fromkeys(_parts("model", text)))
    for one in found:
        if one not in models.names():
            catalogue.config_path(one)
    return found


def parse_frameworks(text: str, first: Iterable[str] = ()) -> tuple[str, ...]:
    """Comma-separated keys, or `all`, which begins with `first`. Raises UsageError."""
    known = tuple(dict.fromkeys((*first, *frameworks.names())))
    return known if text == "all" else _parse_names("framework", text, known)


def parse_shapes(text: str) -> tuple[Workload, ...]:
    """Comma-separated `BATCHxSEQ`. Raises UsageError."""
    return tuple(dict.fromkeys(Workload.parse(part) for part in _parts("shape", text)))


def parse_statuses(text: str | None) -> frozenset[Status]:
    """Comma-separated statuses of records, none without a text. Raises UsageError."""
    if text is None:
        return frozenset()
    return frozenset(map(Status, _parse_names("status", text, tuple(Status))))


def select(
    model_names: Iterable[str],
    framework_names: Iterable[str],
    shapes: Iterable[Workload],
    device: str,
    layers: int | str = 1,
) -> tuple[Case, ...]:
    """The cases in the order they are measured: by model, then framework, smallest shape first."""
    in_order = sorted(shapes, key=lambda shape: (shape.tokens, shape.past))
    return tuple(
        Case(model, framework, shape, device, layers)
        for model in model_names
        for framework in framework_names
        for shape in in_order
    )


def _parse_names(kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
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
