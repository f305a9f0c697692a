"""A verification: whether a framework computes its layers' function; kept as a record is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memladder.core.case import Workload
from memladder.core.record import SCHEMA, Environment, loads, refuse_negative
from memladder.core.serial import AnyFloat, younger


@dataclass(frozen=True)
class Check:
    """One comparison with the fp32 reference: ‖y − ref‖ / ‖ref‖ over `tokens` and its bound.

    `tokens` counts the leading tokens of each sequence that were compared. Where the weights are
    quantised, `ref` has the same quantised weights, and `quantisation_error` is the error against
    the true layer, which is bounded too where the format's theory tells what it may lose: weights
    that are others altogether would agree with themselves.
    """

    model: str
    shape: Workload
    tokens: int
    error: AnyFloat
    tolerance: float
    quantisation_error: AnyFloat | None = None
    quantisation_tolerance: AnyFloat | None = None
    layers: int = younger(1)

    def __post_init__(self) -> None:
        refuse_negative(f"the check of {self.model}", self)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise of the layer's output: −20 log10 of the error."""
        lost = self.quantisation_error
        return -20 * math.log10(lost) if lost else None

    @property
    def agrees(self) -> bool:
        """NaN never agrees."""
        return self.error <= self.tolerance and self.keeps_the_layer

    @property
    def keeps_the_layer(self) -> bool:
        """Whether quantising lost no more than its format explains, as far as that is known."""
        if self.quantisation_tolerance is None:
            return True
        lost = self.quantisation_error
        return lost is not None and lost <= self.quantisation_tolerance


@dataclass(frozen=True)
class StructureCheck:
    """What a framework holds, where its output can't be read, against the layer that it should run.

    `weight_bytes` are held, `expected_bytes` the format's closed form; `differing` names parameters
    that are missing, are of another shape, or are not the layer's.
    """

    model: str
    shape: Workload
    layers: int
    weight_bytes: int
    expected_bytes: int
    differing: tuple[str, ...]
    expected_layers: int = younger(1)

    def __post_init__(self) -> None:
        refuse_negative(f"the check of {self.model}", self)

    @property
    def agrees(self) -> bool:
        """As many layers as asked for, all of their parameters, in the row's format."""
        fits = weights_fit(self.weight_bytes, self.expected_bytes)
        return self.layers == self.expected_layers and not self.differing and fits

    def explain(self) -> str:
        """What was compared, in words."""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        shapes = f"differing: {', '.join(self.differing)}" if self.differing else "all shapes right"
        return (
            f"{layers}, {shapes}, {self.weight_bytes} bytes of weights where "
            f"{self.expected_bytes} are expected"
        )


def weights_fit(held: int, expected: int) -> bool:
    """Are the bytes of the weights those of their format, padding aside?

    One matrix in fp16 where 8 bits were asked for would add 1 % at least: the smallest of the
    figure's layers, LLaMA's k, has 1 % of the parameters.
    """
    return abs(held - expected) <= expected // 200


@dataclass(frozen=True)
class Verification:
    """Whether a framework computes the layers' function, in one environment.

    `structure` has the checks of a framework whose outputs can't be read.
    """

    framework: str
    device: str
    checks: tuple[Check, ...]
    settings: Mapping[str, str | int | float | bool]
    environment: Environment
    structure: tuple[StructureCheck, ...] | None = None
    schema: int = SCHEMA

    @property
    def models(self) -> frozenset[str]:
        """The models whose layers were checked."""
        return frozenset(check.model for check in self._all())

    @property
    def agrees(self) -> bool:
        """All checks agree, and there was at least one."""
        return bool(self._all()) and all(check.agrees for check in self._all())

    def _all(self) -> tuple[Check | StructureCheck, ...]:
        return (*self.checks, *(self.structure or ()))


def loads_verification(text: str) -> Verification:
    """The verification in a JSON text. Raises RecordError."""
    return loads(Verification, text)
