"""`memladder measure`: one cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from memladder import api
from memladder.cli.console import plain_console
from memladder.cli.ending import say
from memladder.cli.options import (
    DEFAULT_TIMEOUT,
    HERE,
    MAX_LAYER,
    MAX_REPEATS,
    BatchSize,
    CacheDir,
    Config,
    Device,
    Framework,
    Layer,
    Layers,
    Model,
    OutputDir,
    Past,
    Repeats,
    SeqLen,
    Timeout,
    count,
    seconds,
)
from memladder.cli.requests import Request
from memladder.cli.terminal import telling
from memladder.core.case import MAX_BATCH_SIZE, MAX_PAST, MAX_SEQ_LEN, Case
from memladder.core.errors import UsageError
from memladder.core.record import Record, Status
from memladder.core.units import format_bytes, mib
from memladder.meter import environment
from memladder.sweeps import store, subjects

# Ended as the protocol foresees; anything else is a failure of the run.
_GOOD = (Status.MEASURED, Status.PLANNED, Status.OOM)


def measure(
    model: Model = "llama",
    framework: Framework = "pytorch",
    batch_size: BatchSize = "1",
    seq_len: SeqLen = "1",
    past: Past = "0",
    layer: Layer = None,
    layers: Layers = "1",
    device: Device = "auto",
    config: Config = None,
    repeats: Repeats = "1",
    timeout: Timeout = DEFAULT_TIMEOUT,
    output_dir: OutputDir = HERE,
    cache_dir: CacheDir = None,
) -> None:
    """Measure one cell; its record goes to log/."""
    request = Request(
        models=model,
        frameworks=framework,
        shapes="x".join(
            str(count(name, text, limit))
            for name, text, limit in (
                ("batch_size", batch_size, MAX_BATCH_SIZE),
                ("seq_len", seq_len, MAX_SEQ_LEN),
            )
        )
        + f"+{count('past', past, MAX_PAST, least=0)}",
        device=device,
        config=config,
        layer=None if layer is None else count("layer", layer, MAX_LAYER, least=0),
        layers=subjects.parse_scope(layers),
        repeats=count("repeats", repeats, MAX_REPEATS),
        timeout_s=seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
        fresh=True,
    )
    raise typer.Exit(_measure(request))


def _measure(request: Request) -> int:
    """Measure one case; prints the artifact's two lines. 0 when measured or out of memory."""
    device = environment.resolve_device(request.device)
    _single("model", request.wanted)
    framework = _single("framework", request.framework_names)
    (shape,) = request.workloads
    ((model, subject),) = request.subjects().items()
    case = Case(model, framework, shape, device, request.layers)
    options = request.options()
    kept = store.Store(request.log)
    with kept.locked():
        past = f" past {shape.past}" if shape.past else ""
        scope = f" layers {case.layers}" if case.whole else ""
        print(
            f"Measure the memory for {model} batch {shape.batch_size} seq {shape.seq_len}"
            f"{past}{scope} under {framework}",
            flush=True,
        )
        with telling(case.id, plain_console(stderr=True)) as tell:
            record = api.measured(case, subject, options, kept, tell)
        path = kept.save(record)
    if record.steady_bytes is not None:
        print({case.id: round(mib(record.steady_bytes))})
    _explain(record, path)
    return 0 if record.status in _GOOD else 1


def _single(kind: str, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UsageError(f"one {kind} is measured at a time, not {', '.join(names)}")
    return names[0]


def _explain(record: Record, path: Path) -> None:
    lines = [f"{record.status}; record: {path}"]
    if record.plan is not None:
        size = format_bytes(record.plan.nbytes)
        lines = [f"planned for {record.plan.target}: {size}; {record.reason}; record: {path}"]
    elif record.reason:
        lines = [f"{record.status}: {record.reason}; record: {path}"]
    if record.hint:
        lines.append(f"to get it: {record.hint}")
    for line in lines:
        say(line)
