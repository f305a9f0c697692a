"""The worker: runs one framework, phase by phase, in a process that is measured from outside.

    python -m memladder.meter.inside.worker EVENTS_FD < order

At the end of each phase it keeps still until the runner has read its memory, so that a phase's end
is a reading of that state and of no other.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memladder import frameworks
from memladder.core.errors import MemladderError, UnavailableError
from memladder.core.record import PHASES
from memladder.core.units import format_bytes
from memladder.core.verification import Check, StructureCheck, weights_fit
from memladder.frameworks._shared.base import Framework, Job, OutOfMemoryError, Session, Structure
from memladder.meter.protocol import (
    AGAIN,
    GO_ON,
    Checked,
    Failure,
    Finished,
    Hold,
    Kind,
    Message,
    Mode,
    Order,
    PhaseStart,
    Planned,
    Prepared,
    decode_order,
    encode,
    one_line,
)
from memladder.models import tensor_shapes

if TYPE_CHECKING:
    import numpy as np

# A pass that takes so long is not repeated: the first run is the steady phase (`Story.spans`).
_LONG_PASS_S = 15.0
# Of what no layer at all would lose: weights of which that much is lost are others.
_ALONE = 0.98
# A framework may err a little more than the layer does uncompiled in the same dtype, not much more.
_OWN_ROUNDINGS = 1.25
# So few tokens in, positions are small, and the bound holds for every layer: a wrong mask shows.
_HEAD_TOKENS = 32


def main(arguments: list[str]) -> int:
    """Do what the order on standard input says; exit status 0 when it was done."""
    channel = Channel(int(arguments[0]))
    work = {Mode.PREPARE: _prepare, Mode.MEASURE: _measure, Mode.VERIFY: _verify, Mode.PLAN: _plan}
    try:
        work[channel.order.mode](channel.order, channel)
    except BaseException as error:
        traceback.print_exc()
        channel.send(failure(error))
        return 1
    return 0


class WrongFormatError(Exception):
    """The weights are not held in the format that the row's name says."""


class Channel:
    """The worker's end of both pipes. Neither is inherited by what a framework starts."""

    def __init__(self, events: int) -> None:
        os.set_inheritable(events, False)
        self._events = os.fdopen(events, "wb")
        self._control = os.fdopen(os.dup(0), "rb")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self.order = decode_order(self._control.readline())

    def send(self, message: Message) -> None:
        """Write one message."""
        self._events.write(encode(message))
        self._events.flush()

    def hold(self) -> bool:
        """Keep still until the runner has read this state; False when it wants one pass more."""
        self.send(Hold(time.monotonic_ns()))
        answer = self._control.readline()
        if answer not in (GO_ON, AGAIN):
            raise RuntimeError(f"the runner answered {answer[:20]!r}")
        return answer == GO_ON


class _Phases:
    """The phase that the worker is in; each ends with a hold."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.current: str | None = None
        self._since_ns = 0

    def start(self, name: str) -> None:
        if self.current is not None:
            self._channel.hold()
        self._since_ns = time.monotonic_ns()
        self._channel.send(PhaseStart(name, self._since_ns))
        self.current = name

    def lasted_s(self) -> float:
        """Seconds since the current phase began."""
        return (time.monotonic_ns() - self._since_ns) / 1e9

    def announced(self, name: str) -> None:
        """What a session may say itself: `first run`, once, while it compiles."""
        if (self.current, name) != ("compile", "first run"):
            raise RuntimeError(f"a session announced {name!r} in phase {self.current!r}")
        self.start(name)


def _framework(order: Order) -> Framework:
    return frameworks.load(order.module, order.jobs[0].case.framework)


def _prepare(order: Order, channel: Channel) -> None:
    _framework(order).prepare(order.jobs[0].job())
    channel.send(Prepared())


def _plan(order: Order, channel: Channel) -> None:
    framework, job = _framework(order), order.jobs[0].job()
    plan, settings = framework.plan(job)
    _held_weights(framework, job, plan.parts)
    channel.send(Planned(plan, dict(settings)))


def _measure(order: Order, channel: Channel) -> None:
    phases = _Phases(channel)
    phases.start(PHASES[0])
    framework, job = _framework(order), order.jobs[0].job()
    session = framework.session(job, phases.announced)
    _bring_up(session, phases)
    passes = 1
    if phases.lasted_s() < _LONG_PASS_S:
        # What the first run left for the collector is no part of the steady state.
        gc.collect()
        phases.start("steady")
        session.begin_steady()
        passes = _loop(session, channel, phases, order.steady_s)
    else:
        channel.hold()
    end = time.monotonic_ns()
    categories = dict(session.categories())
    _held_weights(framework, job, categories)
    channel.send(Finished(end, passes, dict(session.settings()), categories))


def _held_weights(framework: Framework, job: Job, categories: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the weights as held, and in the row's format; raises where these disagree."""
    held, expected = categories["weights"], framework.weight_bytes(job)
    if not weights_fit(held, expected):
        raise WrongFormatError(
            f"the weights take {format_bytes(held)} where those of {framework.title} take "
            f"{format_bytes(expected)}: they are in another format"
        )
    cache = categories.get("kv_cache", 0)
    wanted = framework.cache_bytes(job)
    if job.case.shape.past and not weights_fit(cache, wanted):
        raise WrongFormatError(
            f"the key-value cache takes {format_bytes(cache)} where {job.case.shape} takes "
            f"{format_bytes(wanted)} under {framework.title}"
        )
    return held, expected


def _loop(session: Session, channel: Channel, phases: _Phases, steady_s: float) -> int:
    passes = 0
    while True:
        session.run()
        passes += 1
        if phases.lasted_s() >= steady_s and channel.hold():
            return passes


def _bring_up(session: Session, phases: _Phases) -> None:
    phases.start("context")
    session.context()
    phases.start("weights")
    session.weights()
    phases.start("compile")
    session.compile()
    if phases.current == "compile":
        phases.start("first run")
        session.run()


def _verify(order: Order, channel: Channel) -> None:
    framework = _framework(order)
    for text in order.jobs:
        channel.send(_checked(framework, text.job()))
        gc.collect()


def _checked(framework: Framework, job: Job) -> Checked:
    """Run one narrow layer and compare it with the fp32 reference on the same weights."""
    framework.prepare(job)
    session = _ran(framework, job)
    held, expected_bytes = _held_weights(framework, job, session.categories())
    structure = session.structure()
    if structure is None:
        return _compared(framework, job, session)
    found = StructureCheck(
        job.case.model,
        job.case.shape,
        structure.layers,
        held,
        expected_bytes,
        _differing(structure, job),
        job.layer_count,
    )
    return Checked((), dict(session.settings()), found)


def _ran(framework: Framework, job: Job) -> Session:
    """A session after its first pass."""
    announced: list[str] = []
    session = framework.session(job, announced.append)
    session.context()
    session.weights()
    session.compile()
    if not announced:
        session.run()
    return session


def _differing(structure: Structure, job: Job) -> tuple[str, ...]:
    """Parameters that are held and not the layer's, or the other way, or of another shape."""
    wanted = {(name, *shape) for name, shape in tensor_shapes(job.config).items()}
    held = {(name, *shape) for name, shape in structure.shapes.items()}
    return tuple(sorted({str(name) for name, *_ in wanted ^ held}))


def _compared(framework: Framework, job: Job, session: Session) -> Checked:
    """The session's output held against the reference's."""
    from memladder.models import reference

    true = _expected(job)
    own = framework.reference(job)
    expected = true if own is None else own
    output = session.output()
    if output.shape != expected.shape:
        raise ValueError(f"output has shape {output.shape}, the reference {expected.shape}")
    settings = dict(session.settings())
    # What each layer rounds adds up as noise does.
    bound = framework.tolerance(job.case.device) * math.sqrt(job.layer_count + job.case.whole)
    length = output.shape[1]
    most_lost = None
    if own is not None:
        # Of a whole model the worst is to say nothing.
        nothing = 1.0
        if job.model is None:
            nothing = reference.absent(job.config, job.case.shape, job.seed, true)
        explained = framework.quantisation_tolerance(job)
        most_lost = _ALONE * nothing
        most_lost = most_lost if explained is None else min(most_lost, explained)

    def check(tokens: int, tolerance: float) -> Check:
        found = output[:, :tokens]
        error = reference.error(found, expected[:, :tokens])
        lost = None if own is None else reference.error(found, true[:, :tokens])
        case, layers = job.case, job.layer_count
        return Check(case.model, case.shape, tokens, error, tolerance, lost, most_lost, layers)

    whole = check(length, bound)
    dtype = settings.get("dtype")
    if not whole.agrees and framework.rounds_as_layer and isinstance(dtype, str):
        # The layer itself may be no closer to float32 in this dtype: `reference.output` says why.
        least = reference.error(_expected(job, dtype), true)
        whole = check(length, max(bound, _OWN_ROUNDINGS * least))
    # Else the whole output had to meet the plain bound.
    if not framework.rounds_as_layer or length <= _HEAD_TOKENS:
        return Checked((whole,), settings)
    return Checked((whole, check(_HEAD_TOKENS, bound)), settings)


def _expected(job: Job, dtype: str = "float32") -> np.ndarray:
    """What the layer, or the model, computes in a dtype, uncompiled."""
    import torch

    from memladder.models import reference, weights, whole

    kind = getattr(torch, dtype)
    if job.model is not None:
        source = whole.Source(job.model, job.layer_count, job.cache_dir, job.seed)
        return whole.reference(source, job.case.shape, kind)
    path = weights.ensure(job.config, job.cache_dir, job.seed)
    return reference.output(job.config, path, job.case.shape, job.seed, kind)


def failure(error: BaseException) -> Failure:
    """An exception as the worker's last message; its own line first."""
    message = one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, OutOfMemoryError):
        return Failure(Kind.OOM, message, error.asked_bytes, None)
    if isinstance(error, MemoryError):
        return Failure(Kind.OOM, message, None, None)
    if isinstance(error, WrongFormatError):
        return Failure(Kind.FAILED, one_line(str(error)), None, None)
    if isinstance(error, UnavailableError):
        return Failure(Kind.UNAVAILABLE, one_line(str(error)), None, error.hint)
    if isinstance(error, MemladderError):
        return Failure(Kind.REFUSED, one_line(str(error)), None, None)
    return Failure(Kind.FAILED, message, None, None)


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        # What a framework spawns would import from the working directory first (3.11 knows better).
        os.chdir("/")
    sys.exit(main(sys.argv[1:]))
