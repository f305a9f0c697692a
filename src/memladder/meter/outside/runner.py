"""Measuring a case from start to end: prepared, run in processes of its own, made into a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from memladder import frameworks, models
from memladder.core import devices
from memladder.core.case import ALL, Case, Workload
from memladder.core.devices import UNKNOWN, Device
from memladder.core.errors import RecordError, UnavailableError, UsageError, WorkerError
from memladder.core.record import ForeignProcess, LayerFacts, Record, Run, Source, Status
from memladder.core.units import MIB, format_bytes
from memladder.core.verification import Verification
from memladder.environments import ask
from memladder.frameworks._shared.base import Availability, Framework, Job, Setting
from memladder.meter import environment
from memladder.meter.outside.log import Log
from memladder.meter.outside.patience import watched
from memladder.meter.outside.samples import Span
from memladder.meter.outside.watch import Limits, Problem, Story
from memladder.meter.protocol import JobText, Mode, Order
from memladder.models import catalogue

__all__ = ["STEADY_S", "Event", "Limits", "measure", "run_once", "unavailable", "verify"]

STEADY_S = 2.0
# One token, several rows, and a long sequence: each takes other kernels.
VERIFIED_SHAPES = (Workload(1, 1), Workload(32, 1), Workload(1, 4096))
VERIFIED_PAST = Workload(2, 5, past=11)
_ITEM_BYTES = 2
# No CUDA context is this small; a case with less did not run on the device.
_LEAST_CONTEXT = 32 * MIB
_SETTLE_S = 5.0
_SETTLED_S = 0.3


@dataclass(frozen=True)
class Event:
    """Something to show while a case runs. `repeat` counts from 1; 0 before the first."""

    phase: str
    repeat: int
    repeats: int
    current_bytes: int

    def __str__(self) -> str:
        which = f"run {self.repeat} of {self.repeats}, " if self.repeat and self.repeats > 1 else ""
        return f"{which}{self.phase}, {format_bytes(self.current_bytes)}"


OnEvent = Callable[[Event], None]


def unavailable(case: Case, found: Availability, framework: Framework | None = None) -> Record:
    """The record of a case whose framework can't run here."""
    return Record(
        case=case,
        status=Status.UNAVAILABLE,
        reason=found.reason or f"{case.framework} can't run on {case.device}",
        hint=found.install,
        asked_bytes=None,
        layer=None,
        settings={},
        environment=environment.describe(case, framework),
        runs=(),
    )


def measure(
    job: Job,
    framework: Framework,
    *,
    repeats: int,
    limits: Limits,
    log_path: Path,
    on_event: OnEvent | None = None,
    module: str | None = None,
    steady_s: float = STEADY_S,
    prepare: bool = True,
) -> Record:
    """Measure one case in `repeats` processes, after one that prepares what they read.

    Without `prepare` that is there already.

    Whatever happens in the processes becomes the record's status; their output goes to `log_path`.
    `module` serves the framework, by default its file in `frameworks`.
    Raises DeviceError where the device is not here, UsageError where the log can't be written or
    the layer can't be prepared as asked (a full disk, a configuration that makes no layer).
    """
    if repeats < 1:
        raise UsageError(f"repeats {repeats} is less than 1")
    case = job.case
    found = ask.availability(case.framework, framework, case.device)
    if not found.available:
        return unavailable(case, found, framework)
    refused = framework.refuses(job)
    if refused is not None:
        return unavailable(case, Availability(False, found.version, refused), framework)
    device = devices.device(case.device)
    variables = framework.environment(case)
    module = module or frameworks.module(case.framework)
    with Log(log_path) as log:
        attempt = _Attempt(job, module, variables, device, limits, log, on_event, repeats)
        problem = attempt.tell(0, Mode.PREPARE, 0.0).problem if prepare else None
        if problem is not None and problem.refused:
            raise UsageError(problem.reason)
        if found.plans and problem is None:
            return _planned(attempt, framework, found)
        runs, settings, problem = _repeated(attempt, steady_s, problem)
    return Record(
        case=case,
        status=problem.status if problem else Status.MEASURED,
        reason=problem.reason if problem else None,
        hint=problem.hint if problem else None,
        asked_bytes=problem.asked_bytes if problem else None,
        layer=_facts(job),
        settings={} if problem else {**settings, **variables},
        environment=environment.describe(case, framework),
        runs=() if problem else tuple(runs),
    )


def _repeated(
    attempt: _Attempt, steady_s: float, problem: Problem | None
) -> tuple[list[Run], Mapping[str, Setting], Problem | None]:
    """The runs of a case, up to the first problem."""
    runs: list[Run] = []
    settings: Mapping[str, Setting] = {}
    while problem is None and len(runs) < attempt.repeats:
        outcome = attempt.measured(len(runs) + 1, steady_s)
        if isinstance(outcome, Problem):
            problem = outcome
        else:
            run, settings = outcome
            runs.append(run)
    return runs, settings, problem


def _planned(attempt: _Attempt, framework: Framework, found: Availability) -> Record:
    """The record of a case that its framework's compiler plans, and that did not run."""
    story = attempt.tell(0, Mode.PLAN, 0.0)
    problem, planned = story.problem, story.planned
    plan = planned.plan if planned and not problem else None
    asked = problem.asked_bytes if problem else None
    case = attempt.job.case
    return Record(
        case=case,
        status=problem.status if problem else Status.PLANNED,
        reason=problem.reason if problem else found.reason,
        hint=problem.hint if problem else None,
        asked_bytes=plan.nbytes if plan else asked,
        layer=_facts(attempt.job),
        settings=planned.settings if planned and not problem else {},
        environment=environment.describe(case, framework),
        runs=(),
        plan=plan,
    )


def run_once(
    job: Job,
    module: str,
    *,
    variables: Mapping[str, str],
    limits: Limits,
    log_path: Path,
    steady_s: float = STEADY_S,
) -> Run:
    """One measured process, nothing prepared. Raises WorkerError when it fails."""
    device = devices.device(job.case.device)
    with Log(log_path) as log:
        attempt = _Attempt(job, module, variables, device, limits, log, None, 1)
        outcome = attempt.measured(1, steady_s)
    if isinstance(outcome, Problem):
        raise WorkerError(f"{module}: {outcome.reason}; log: {log_path}")
    return outcome[0]


def verify(
    name: str,
    framework: Framework,
    device: str,
    *,
    cache_dir: Path,
    limits: Limits,
    log_path: Path,
    on_event: OnEvent | None = None,
    model_names: Sequence[str] | None = None,
    shapes: Sequence[Workload] = VERIFIED_SHAPES,
    seed: int = 0,
    module: str | None = None,
) -> Verification:
    """Compare a framework with the fp32 reference on narrow layers: each model at each shape.

    Raises UnavailableError where the framework can't run, WorkerError where it breaks down.
    """
    found = ask.availability(name, framework, device)
    if not found.available:
        raise UnavailableError(found.reason or f"{name} can't run on {device}", found.install)
    jobs = [
        Job(Case(model, name, shape, device), models.narrow_config(model), cache_dir, seed)
        for model in model_names or models.names()
        for shape in shapes
    ]
    jobs += _scopes(jobs, framework)
    variables = framework.environment(jobs[0].case)
    order = Order(
        Mode.VERIFY,
        module or frameworks.module(name),
        tuple(JobText.of(job) for job in jobs),
        0.0,
    )
    notify = _notifier(on_event, 0, 1)
    with Log(log_path) as log:
        story = watched(order, limits, devices.device(device), notify, variables, log)
    if story.problem is not None:
        raise WorkerError(f"{name}: {story.problem.reason}; log: {log_path}")
    return Verification(
        framework=name,
        device=device,
        checks=tuple(check for one in story.checked for check in one.checks),
        structure=tuple(one.structure for one in story.checked if one.structure) or None,
        settings={**story.checked[-1].settings, **variables},
        environment=environment.describe(jobs[0].case, framework),
    )


def _scopes(jobs: Sequence[Job], framework: Framework) -> list[Job]:
    """A layer over a past, and a whole model without and with one, where the framework runs them:
    one each for every model."""
    found = []
    for job in {job.case.model: job for job in jobs}.values():
        over = replace(job, case=replace(job.case, shape=VERIFIED_PAST))
        if framework.pasts:
            found.append(over)
        if framework.wholes:
            model = catalogue.narrow(job.case.model, job.cache_dir)
            whole = replace(over, model=model, case=replace(over.case, layers=ALL))
            found.append(replace(whole, case=replace(whole.case, shape=Workload(2, 5))))
            if framework.pasts:
                found.append(whole)
    return found


@dataclass(frozen=True)
class _Attempt:
    """A case and how its processes are run."""

    job: Job
    module: str
    variables: Mapping[str, str]
    device: Device | None
    limits: Limits
    log: Log
    on_event: OnEvent | None
    repeats: int

    def tell(self, repeat: int, mode: Mode, steady_s: float) -> Story:
        """Run one worker; its story."""
        order = Order(mode, self.module, (JobText.of(self.job),), steady_s)
        notify = _notifier(self.on_event, repeat, self.repeats)
        return watched(order, self.limits, self.device, notify, self.variables, self.log)

    def measured(self, repeat: int, steady_s: float) -> tuple[Run, Mapping[str, Setting]] | Problem:
        """One measured process: its run and the session's settings, or why there is none."""
        if self.device is not None:
            settle(self.device)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        story = self.tell(repeat, Mode.MEASURE, steady_s)
        if story.problem is not None or story.finished is None:
            assert story.problem is not None
            return story.problem
        try:
            return _run(story, started), story.finished.settings
        except RecordError as error:
            return Problem(Status.FAILED, str(error))


def settle(device: Device) -> int:
    """Wait until memory of an earlier process has been given back, 5 s at most; bytes in use."""
    deadline = time.monotonic() + _SETTLE_S
    used = device.used_bytes()
    since = time.monotonic()
    while (now := time.monotonic()) < deadline and now - since < _SETTLED_S:
        time.sleep(0.05)
        latest = device.used_bytes()
        if latest < used:
            since = now
        used = latest
    return used


def _run(story: Story, started: str) -> Run:
    """A finished worker's readings as a run. Raises RecordError where a phase was not read."""
    assert story.finished is not None
    samples, spans = story.samples, story.spans()
    source = samples.source()
    origin = spans[0].start_ns
    whole = Span("run", origin, spans[-1].end_ns)
    polls = samples.polls.within(whole)
    phases = tuple(samples.phase(span, origin, source) for span in spans)
    if source is not Source.PSS and phases[-1].peak_bytes < _LEAST_CONTEXT:
        raise RecordError("the case took no memory on the device that NVML could see")
    return Run(
        started=started,
        source=source,
        phases=phases,
        passes=story.finished.passes,
        polls=len(polls),
        polls_per_s=len(polls) / ((whole.end_ns - whole.start_ns) / 1e9),
        longest_gap_s=samples.longest_gap_ns(polls) / 1e9,
        idle_device_bytes=None if samples.idle == UNKNOWN else samples.idle,
        foreign=_foreign(story, source),
        categories=story.finished.categories,
        trace=samples.trace(spans, source),
    )


def _foreign(story: Story, source: Source) -> tuple[ForeignProcess, ...]:
    """Processes of others on the device.

    Where NVML attributes nothing to our process ids, it may know our worker under the number of
    another process namespace: the one that has no name here and came after the start. Of several
    nobody can tell which is ours: all of them are listed.
    """
    maybe_ours = [
        pid
        for pid, (name, _) in story.others.items()
        if source is Source.NVML_DEVICE_DELTA and name == "unknown" and pid not in story.before
    ]
    found = []
    for pid, (name, most) in sorted(story.others.items()):
        if [pid] != maybe_ours:
            label = f"{name}, perhaps ours" if pid in maybe_ours else name
            found.append(ForeignProcess(pid, label, most))
    return tuple(found)


def _facts(job: Job) -> LayerFacts:
    around = 0 if job.model is None else models.count_elements(job.model.around)
    layers = sum(count * models.parameters(config) for count, config in job.groups)
    return LayerFacts(
        config=(job.model or job.config).values,
        digest=job.digest,
        parameters=around + layers,
        weight_bytes=_ITEM_BYTES * (around + layers),
        seed=job.seed,
        layers=job.layer_count,
        note=job.note,
    )


def _notifier(on_event: OnEvent | None, repeat: int, repeats: int) -> Callable[[str, int], None]:
    def notify(phase: str, current_bytes: int) -> None:
        if on_event is not None:
            on_event(Event(phase, repeat, repeats, current_bytes))

    return notify
