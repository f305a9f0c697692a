"""A sweep on this machine: one case after the other, resumed from the store, watched by a view."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memladder import frameworks
from memladder.core.case import Case
from memladder.core.errors import MemladderError
from memladder.core.record import Record, Status
from memladder.core.verification import Verification
from memladder.frameworks._shared.base import Job
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.models import Subject
from memladder.sweeps.cases import availability
from memladder.sweeps.store import Contents, Store

# A case that ended so is not tried again: a second try would end the same way.
_FINAL = (Status.MEASURED, Status.PLANNED, Status.OOM)


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep measures. `fresh` ignores what the store already has, `retry` what ended so."""

    cache_dir: Path
    repeats: int
    limits: runner.Limits
    seed: int = 0
    fresh: bool = False
    retry: frozenset[Status] = frozenset()


class View(Protocol):
    """What a sweep tells while it works."""

    def started(self, case: Case) -> None:
        """A case is measured from now on."""

    def verifying(self, framework: str) -> None:
        """A framework's numerics are checked from now on."""

    def event(self, event: runner.Event) -> None:
        """Something happened inside the case."""

    def finished(self, record: Record, seconds: float, resumed: bool) -> None:
        """A case has ended; `resumed` when its record was already there."""

    def warning(self, text: str) -> None:
        """Something that the user should know and need not act on."""


@dataclass(frozen=True)
class Outcome:
    """All records of the sweep's cases, and the checks of the frameworks that ran.

    `unverified` are frameworks whose check broke down: their records say nothing of their numerics.
    """

    records: tuple[Record, ...]
    verifications: tuple[Verification, ...]
    unverified: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Did all that could run here end in a measurement or an honest out-of-memory, and was
        each framework found to agree?"""
        ended = (*_FINAL, Status.UNAVAILABLE)
        measured = all(r.status in ended for r in self.records)
        return measured and not self.unverified and all(v.agrees for v in self.verifications)


def sweep(
    cases: Sequence[Case],
    subjects: Mapping[str, Subject],
    store: Store,
    options: SweepOptions,
    view: View,
) -> Outcome:
    """Measure `cases` into `store`, which the caller has locked. `subjects` is by model."""
    contents = store.read()
    for path, reason in contents.foreign.items():
        kept = store.set_aside(path)
        view.warning(f"{path} is not a record of memladder ({reason}); moved to {kept}")
    # None where there is no output to check.
    verifications: dict[str, Verification | None] = {}
    unverified = []
    records = []
    prepared: set[str] = set()
    for case in cases:
        name = case.framework
        if name not in verifications and name not in unverified:
            try:
                verifications[name] = _verification(case, store, contents, options, view)
            except MemladderError as error:
                unverified.append(name)
                view.warning(f"{name} could not be verified: {error}")
        job = Job.of(case, subjects[case.model], options.cache_dir, options.seed)
        started = time.monotonic()
        known = None if options.fresh else _known(job, contents, options)
        if known is None:
            view.started(case)
            framework = frameworks.get(name)
            made = framework.makes(job)
            record = runner.measure(
                job,
                framework,
                repeats=options.repeats,
                limits=options.limits,
                log_path=store.log_path(store.name(case)),
                on_event=view.event,
                prepare=made not in prepared,
            )
            if record.status is Status.MEASURED:
                prepared.add(made)
            store.save(record)
        else:
            record = known
        view.finished(record, time.monotonic() - started, known is not None)
        records.append(record)
    checked = tuple(found for found in verifications.values() if found is not None)
    return Outcome(tuple(records), checked, tuple(unverified))


def _known(job: Job, contents: Contents, options: SweepOptions) -> Record | None:
    """The store's record of this very case, layer and environment, if it need not be repeated."""
    framework = frameworks.get(job.case.framework)
    here = environment.describe(job.case, framework)
    for record in contents.records:
        if (
            record.case == job.case
            and record.layer is not None
            and (record.layer.digest, record.layer.seed) == (job.digest, job.seed)
            and record.status in _FINAL
            and record.status not in options.retry
            and (record.status is not Status.MEASURED or len(record.runs) >= options.repeats)
            and record.environment.same_as(here)
        ):
            return record
    return None


def _verification(
    case: Case, store: Store, contents: Contents, options: SweepOptions, view: View
) -> Verification | None:
    """The framework's check against the reference: the store's if it is of this environment.

    None for one that plans and has no output. Raises MemladderError where the check breaks down.
    """
    framework = frameworks.get(case.framework)
    if availability(case.framework, case.device).plans:
        return None  # There is no output to check.
    here = environment.describe(case, framework)
    for known in contents.verifications:
        if (
            not options.fresh
            and (known.framework, known.device) == (case.framework, case.device)
            and known.environment.same_as(here)
            and known.agrees
        ):
            return known
    view.verifying(case.framework)
    verification = runner.verify(
        case.framework,
        framework,
        case.device,
        cache_dir=options.cache_dir,
        limits=options.limits,
        log_path=store.log_path(f"verification_{case.framework}"),
        on_event=view.event,
    )
    store.save(verification)
    if not verification.agrees:
        view.warning(
            f"{case.framework} does not agree with the fp32 reference; it stays out of the figure"
        )
    return verification
