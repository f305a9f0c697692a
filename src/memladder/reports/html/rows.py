"""Records as the page has them: a light row that is drawn at once, a detail that is read later.

Texts go into the page as they are in the record; the page shows them as text and never as markup.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memladder import formats, models
from memladder.accounting import split
from memladder.core.errors import MemladderError
from memladder.core.ledger import Ledger
from memladder.core.record import Record, Run, Source, Status
from memladder.core.serial import to_json
from memladder.core.units import MIB
from memladder.core.verification import Verification
from memladder.engine.program.budget import budget
from memladder.models import LayerConfig
from memladder.predictor import evidence
from memladder.predictor.evidence import Compared
from memladder.reports.cells import problem, system_label

_POINTS = 240
"""Of a trace that is drawn."""
_HELD = ("weights", "scales", "embeddings", "kv_cache")
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Shown:
    """One store that the page shows: what to call it, and what it holds."""

    name: str
    records: tuple[Record, ...]
    verifications: tuple[Verification, ...]


def row(record: Record, checks: Sequence[Verification], number: int, known: Compared | None,
        published: Mapping[str, int]) -> dict[str, Any]:  # fmt: skip
    """What figure and table need. Sizes are bytes, None where there are none.

    `bytes` are steady ones, or a plan's; `base` is what of them was there before anything was
    loaded; `noise` is the distance of the smallest repeat to the largest.
    """
    case, shape = record.case, record.case.shape
    predicted = known.prediction if known else None
    is_shown = record.status in (Status.MEASURED, Status.PLANNED, Status.PREDICTED)
    sizes = [run.steady_bytes for run in record.runs]
    published_mib = published.get(case.id) if not is_custom(record) else None
    return {
        "store": number,
        "id": case.id,
        "model": case.model,
        "modelTitle": models.title(case.model),
        "framework": case.framework,
        "system": system_label(case.framework),
        "precision": precision(record),
        "workload": str(shape),
        "scope": "one layer" if case.layers == 1 else f"{case.layers} layers",
        "device": record.plan.target if record.plan else record.environment.machine.device,
        "status": record.status.value,
        "problem": problem(record, checks) if record.status is Status.MEASURED else None,
        "bytes": (record.steady_bytes or record.asked_bytes) if is_shown else None,
        "peak": record.peak_bytes,
        "base": base_bytes(record),
        "runs": len(record.runs),
        "noise": max(sizes) - min(sizes) if len(sizes) > 1 else None,
        "published": None if published_mib is None else published_mib * MIB,
        "predicted": predicted.total_bytes if predicted else None,
        "low": predicted.low_bytes if predicted else None,
        "high": predicted.high_bytes if predicted else None,
        "budget": budget_bytes(record, known),
        "reason": record.reason,
    }


def detail(record: Record, known: Compared | None) -> dict[str, Any]:
    """What is shown of one cell, but for its environment, which many records share."""
    predicted = known.prediction if known else None
    plain = to_json(replace(record, runs=tuple(replace(run, trace=()) for run in record.runs)))
    del plain["environment"]
    for run, original in zip(plain["runs"], record.runs, strict=True):
        run["trace"] = f"{len(original.trace)} points, in the store"
    return {
        "ledger": _entries(split.ledger(record, known)) if record.runs else _plan_entries(record),
        "predictedLedger": _entries(predicted.ledger) if predicted else None,
        "unpredicted": known.reason if known else None,
        "notes": list(predicted.notes) if predicted else [],
        "command": command(record),
        "custom": is_custom(record),
        "traces": [trace(run) for run in record.runs],
        "raw": plain,
    }


def compare_all(records: Sequence[Record]) -> list[Compared | None]:
    """The prediction of each measured record; None for the others."""
    made = iter(evidence.compare(records))
    return [next(made) if record.status is Status.MEASURED else None for record in records]


def precision(record: Record) -> str:
    """The format of the weights: the last word of a framework's key, or what it computes in.

    `pytorch` computes in the setting's dtype, `ladder_fp16_int4` keeps int4.
    """
    _, has_format, form = record.case.framework.rpartition("_")
    if has_format:
        return form
    dtype = str(record.settings.get("dtype", "float16"))
    return _DTYPES.get(dtype, dtype)


def is_custom(record: Record) -> bool:
    """Is the layer another than the model's own, so that nothing published is of it?"""
    if record.layer is None or record.case.model not in models.names():
        return False
    return record.layer.digest != models.layer_config(record.case.model).digest


def base_bytes(record: Record) -> int | None:
    """What the process had before it loaded anything: CUDA's context, or imported libraries."""
    if record.plan is not None:
        return record.plan.assumed.get("cuda_context")
    if record.import_bytes is not None:
        return record.import_bytes
    found = [
        phase.end_bytes
        for run in record.runs
        if run.source is not Source.PSS
        for phase in run.phases
        if phase.name == "context"
    ]
    return round(statistics.median(found)) if found else None


def budget_bytes(record: Record, known: Compared | None) -> int | None:
    """What the cell is held against: weights in the row's own format, cache, and the activations of
    the engine's schedule. None where the layer or its rules are not known."""
    if record.layer is None or record.case.layers != 1 or not (known and known.prediction):
        return None
    ledger = known.prediction.ledger
    held = sum(ledger.nbytes(name) for name in _HELD)
    try:
        config = LayerConfig(record.case.model, record.layer.config)
        return held + budget(config, record.case.shape, formats.get("fp16")).activations
    except (KeyError, TypeError, ValueError, ArithmeticError, MemladderError):
        return None


def command(record: Record) -> str:
    """The command that measures the case again, quoted for a shell."""
    case, shape = record.case, record.case.shape
    words = [
        *("memladder", "measure", "--model", case.model, "--framework", case.framework),
        *("--batch-size", str(shape.batch_size), "--seq-len", str(shape.seq_len)),
        *(("--past", str(shape.past)) if shape.past else ()),
        *(("--layers", str(case.layers)) if case.layers != 1 else ()),
        *("--device", case.device),
        *(("--repeats", str(len(record.runs))) if len(record.runs) > 1 else ()),
        *(("--config", "config.json") if is_custom(record) else ()),
    ]
    return shlex.join(words)


def trace(run: Run) -> dict[str, Any]:
    """A run's readings over time, thinned so that each part keeps its highest, and its phases.

    Times are milliseconds since the start, sizes bytes of the run's source.
    """
    on_host = run.source is Source.PSS
    points = [
        (round(1000 * point.s), point.pss_bytes if on_host else point.device_bytes or 0)
        for point in run.trace
    ]
    step = -(-len(points) // _POINTS) or 1
    kept = [
        max(points[start : start + step], key=lambda point: point[1])
        for start in range(0, len(points), step)
    ]
    return {
        "source": run.source.value,
        "started": run.started,
        "times": [time for time, _ in kept],
        "sizes": [size for _, size in kept],
        "phases": [
            [p.name, round(1000 * p.start_s), round(1000 * p.end_s), p.peak_bytes, p.end_bytes]
            for p in run.phases
        ],
    }


def _entries(ledger: Ledger) -> list[list[Any]]:
    return [[e.category, e.nbytes, e.known.value, e.note] for e in ledger.entries]


def _plan_entries(record: Record) -> list[list[Any]] | None:
    if record.plan is None:
        return None
    parts = [[name, size, "planned", None] for name, size in record.plan.parts.items()]
    return parts + [[name, size, "assumed", None] for name, size in record.plan.assumed.items()]
