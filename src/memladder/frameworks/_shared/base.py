"""What a framework is to memladder: available or not, prepared, and run phase by phase."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.core.case import ALL, Case
from memladder.core.plan import CompilerPlan
from memladder.models import (
    LayerConfig,
    ModelConfig,
    Subject,
    cache_geometry,
    names,
    parameters,
    tensor_shapes,
)

if TYPE_CHECKING:
    import numpy as np

    from memladder.frameworks._rules.question import Answer, Question

Setting = str | int | float | bool


@dataclass(frozen=True)
class Availability:
    """Whether a framework can run on a device here; if not, why, and what would change that.

    With `plans` it can't run, for the `reason` given, but its compiler can say what it would take
    on another device (`Framework.plan`): the case is planned, and not measured.
    """

    available: bool
    version: str | None = None
    reason: str | None = None
    install: str | None = None
    plans: bool = False


@dataclass(frozen=True)
class Job:
    """A case made concrete: the layer's configuration and where caches live.

    `model` is there where the case is of a whole model or some of its layers; `config` is then the
    usual one of them. `note` tells what of a configuration was left out.
    """

    case: Case
    config: LayerConfig
    cache_dir: Path
    seed: int = 0
    model: ModelConfig | None = None
    note: str | None = None

    @classmethod
    def of(cls, case: Case, subject: Subject, cache_dir: Path, seed: int = 0) -> Job:
        """The job of a case."""
        return cls(case, subject.config, cache_dir, seed, subject.model, subject.note)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of what is run."""
        return (self.model or self.config).digest

    @property
    def layer_count(self) -> int:
        """Decoder layers that run."""
        if self.model is None or self.case.layers == ALL:
            return 1 if self.model is None else self.model.layer_count
        return int(self.case.layers)

    @property
    def groups(self) -> tuple[tuple[int, LayerConfig], ...]:
        """How many layers run of each kind."""
        if self.model is None:
            return ((1, self.config),)
        counts = (
            (sum(number < self.layer_count for number in group.numbers), group.layer)
            for group in self.model.layers
        )
        return tuple((count, layer) for count, layer in counts if count)


@dataclass(frozen=True)
class Structure:
    """What a session holds, where its output can't be read: decoder layers, and the parameters of
    one by the names and shapes that `models.tensor_shapes` gives them."""

    layers: int
    shapes: Mapping[str, tuple[int, ...]]


def packed_bytes(
    config: LayerConfig, bits: int, group_size: int | None = None, group_bits: int = 0
) -> int:
    """Bytes of a layer whose matrices are quantised along their columns, and nothing else is.

    Each element takes `bits`; each `group_size` neighbours of a row (None: the whole row; a last,
    shorter group counts) share `group_bits` of scales and zero points. Norms and biases keep two
    bytes each.
    """
    total = 0
    for shape in tensor_shapes(config).values():
        if len(shape) == 1:
            total += 16 * shape[0]
            continue
        rows, columns = shape
        groups = rows * -(-columns // (group_size or columns))
        total += bits * math.prod(shape) + group_bits * groups
    return total // 8


class OutOfMemoryError(Exception):
    """Raised by a session when an allocation failed; `asked_bytes` where the framework tells."""

    def __init__(self, message: str, asked_bytes: int | None = None) -> None:
        super().__init__(message)
        self.asked_bytes = asked_bytes


class Session(ABC):
    """A framework at work inside the worker. The worker calls the methods in this order.

    A framework that compiles on its first call runs once inside `compile` and announces
    `first run` itself at the moment when compiling is over; the worker then goes straight on.
    """

    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        """Phase `import`: load the libraries, nothing else."""
        self.job = job
        self.announce = announce

    @abstractmethod
    def context(self) -> None:
        """Phase `context`: bring the device up."""

    @abstractmethod
    def weights(self) -> None:
        """Phase `weights`: put the layer, and nothing else, on the device."""

    @abstractmethod
    def compile(self) -> None:
        """Phase `compile`: make the layer ready to run on the case's shape."""

    @abstractmethod
    def run(self) -> None:
        """One forward pass; returns when the device has finished it."""

    def begin_steady(self) -> None:
        """The steady phase begins: peaks that are kept from now on are its own."""

    @abstractmethod
    def output(self) -> np.ndarray:
        """The last pass's output as float32 [batch_size, seq_len, hidden_size], on the host.

        Not asked for where `structure` answers.
        """

    def structure(self) -> Structure | None:
        """The weights held, where the output can't be read; None where it can, which says more."""
        return None

    @abstractmethod
    def settings(self) -> Mapping[str, Setting]:
        """What a reader needs to reproduce this session: options, dtypes, providers."""

    @abstractmethod
    def categories(self) -> Mapping[str, int]:
        """Bytes that only the framework can know: `weights`, allocator statistics, arenas.

        `weights`, the layers' parameters as they are held, is compared with what they take in the
        row's format (`Framework.weight_bytes`), and `kv_cache` with the cache's closed form
        (`Framework.cache_bytes`); what is held beside the layers has other names.
        """


class Framework(ABC):
    """One way to run a layer. Instances hold no state; a file defines one as `FRAMEWORK`."""

    title: str
    """Label in tables and figures."""
    packages: tuple[str, ...]
    """Distributions whose versions belong into the record."""
    wholes: bool = False
    """Whether it runs whole models: embeddings, several layers, head."""
    pasts: bool = False
    """Whether it runs over a key-value cache of earlier tokens."""
    any_family: bool = False
    """Whether it runs any family that transformers describes, and not only those of `models`."""
    variables: tuple[str, ...] = ()
    """Environment variables that change what it runs or takes, as a shell's patterns: `VLLM_*`.
    They belong into the record, and two environments that differ in them are not the same."""
    rounds_as_layer: bool = True
    """Whether scores are rounded as the layer itself rounds them: to its dtype, which shows where
    BLOOM's positions are large (`models.reference.output`)."""

    @abstractmethod
    def availability(self, device: str) -> Availability:
        """Can it run on `device` (`cpu`, `cuda:N`) here? Imports nothing heavy."""

    def environment(self, case: Case) -> Mapping[str, str]:
        """Environment variables that must stand before the worker starts."""
        return {}

    def prepare(self, job: Job) -> None:
        """Make what the session will read (weights, exported model). Runs in its own process."""

    def makes(self, job: Job) -> str:
        """A name of what `prepare` makes: of a sweep's jobs that share it only one prepares."""
        return job.case.id

    def reference(self, job: Job) -> np.ndarray | None:
        """What the session should compute, where that is not the layer itself in fp32.

        Quantised weights make another layer: it is compared with an fp32 layer of these weights,
        float32 [batch_size, seq_len, hidden_size], and what was lost is told apart from that.
        """
        return None

    def quantisation_tolerance(self, job: Job) -> float | None:
        """Largest ‖y − ref‖ / ‖ref‖ against the true layer in fp32 that the row's number format
        explains; None where that is not known. A row beyond it computes another layer."""
        return None

    def weight_bytes(self, job: Job) -> int:
        """Bytes of the layer's parameters in this row's number format, in closed form.

        A session that holds other bytes ignored its format, and its row is a failure. Runs in the
        worker. By default two bytes a parameter; `packed_bytes` counts quantised matrices.
        """
        return sum(2 * count * parameters(config) for count, config in job.groups)

    def cache_bytes(self, job: Job) -> int:
        """Bytes of the key-value cache, in closed form; 0 without a past.

        A session that has another `kv_cache` did not keep the past, and its row is a failure. By
        default two bytes a number, as transformers keeps a layer's.
        """
        if not job.case.shape.past:
            return 0
        return sum(
            2 * count * cache_geometry(config).elements(job.case.shape)
            for count, config in job.groups
        )

    def refuses(self, job: Job) -> str | None:
        """Why this framework can't run the job's scope, past or family; None where it can."""
        if job.case.whole and not self.wholes:
            return f"{self.title} runs single layers here, not whole models"
        if job.case.shape.past and not self.pasts:
            return f"{self.title} has no key-value cache here, so no past"
        if job.config.outline is not None and not self.any_family:
            return (
                f"{self.title} runs layers of {' and '.join(names())} here, not {job.config.model}"
            )
        return None

    def plan(self, job: Job) -> tuple[CompilerPlan, Mapping[str, Setting]]:
        """Compile the job for another device, and what is needed to repeat that.

        For frameworks whose availability says `plans`. Runs in a process of its own; `weights` is
        one of the plan's parts.
        """
        raise NotImplementedError(f"{self.title} has no plan")

    def predict(self, question: Question) -> Answer:
        """What a case would take, without running it. Raises UnpredictableError with the reason.

        The rules are arithmetic on shapes, in `_rules/`; no library of the framework is imported.
        """
        from memladder.frameworks._rules.question import UnpredictableError

        del question
        raise UnpredictableError(f"{self.title} has no rules of prediction")

    @abstractmethod
    def tolerance(self, device: str) -> float:
        """Largest ‖y − ref‖ / ‖ref‖ against the fp32 reference that still counts as agreement."""

    @abstractmethod
    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Start a session; imports the framework's libraries."""
