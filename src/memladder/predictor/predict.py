"""One case: asked of its framework's rules, answered as a ledger with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from memladder import frameworks
from memladder.core.case import MAX_BATCH_SIZE, MAX_SEQ_LEN
from memladder.core.errors import UsageError
from memladder.core.ledger import Entry, Known, summed
from memladder.core.prediction import Prediction
from memladder.frameworks._rules.question import Answer, Device, Question, UnpredictableError
from memladder.frameworks._shared.base import Framework
from memladder.predictor.gpus import Gpu
from memladder.predictor.headers import Checkpoint
from memladder.predictor.model import Model

# A context that was not measured: of the generation whose was, and of another.
_KNOWN_CAPABILITY = (9, 0)
_NEAR_SPREAD, _FAR_SPREAD = 8 << 20, 128 << 20
# Rows whose weights are the checkpoint's own.
_AS_STORED = ("vllm",)
CPU = Device("cpu", 1 << 62, 0, True, None, is_cpu=True)


def device_of(gpu: Gpu) -> Device:
    """What rules need of a GPU."""
    return Device(
        gpu.name, gpu.usable_bytes, gpu.context_bytes, gpu.context_measured, gpu.capability
    )


def question(
    model: Model,
    device: Device,
    *,
    batch_size: int = 1,
    seq_len: int = 1,
    past: int = 0,
    layers: int | None = 1,
    ranks: int = 1,
    cache_format: str = "auto",
    version: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Question:
    """A case's numbers, checked. Raises UsageError."""
    for name, value, limit in (
        ("batch_size", batch_size, MAX_BATCH_SIZE),
        ("seq_len", seq_len, MAX_SEQ_LEN),
        ("ranks", ranks, 1024),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise UsageError(f"{name} {value!r} is not a whole number from 1 to {limit}")
    if isinstance(past, bool) or not isinstance(past, int) or not 0 <= past <= 1 << 30:
        raise UsageError(f"past {past!r} is not a whole number from 0 to {1 << 30}")
    count = model.architecture.layers
    if layers is not None and (
        isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= count
    ):
        raise UsageError(f"layers {layers!r} is not a whole number from 1 to {count}, or all")
    return Question(
        model.architecture, batch_size, seq_len, past, layers, device, ranks, cache_format,
        version, dict(settings or {}),
    )  # fmt: skip


def answer(model: Model, framework: str, asked: Question) -> Prediction:
    """The prediction of one framework. Raises UnpredictableError where its rules have no answer."""
    found = _framework(framework).predict(asked)
    entries, notes = list(found.entries), list(found.notes)
    if model.checkpoint is not None and framework in _AS_STORED and asked.whole:
        entries = _as_stored(entries, model.checkpoint, asked.ranks)
        notes.append(f"weights by the headers of {model.checkpoint.files} safetensors files")
    if not asked.device.is_cpu and not asked.device.context_measured:
        notes.append(f"CUDA's context on {asked.device.name} was not measured: an H100's stands in")
    if asked.model.positions and asked.length > asked.model.positions:
        notes.append(f"{asked.length} tokens are more than the model's {asked.model.positions}")
    ledger = summed(entries)
    margin = _margin(found, asked, {entry.category: entry.nbytes for entry in ledger.entries})
    total = ledger.total_bytes
    return Prediction(
        model=model.name,
        framework=framework,
        batch_size=asked.batch_size,
        seq_len=asked.seq_len,
        past=asked.past,
        layers=asked.layers,
        device=asked.device.name,
        ledger=ledger,
        low_bytes=max(total - margin, 0),
        high_bytes=total + margin,
        version=found.version,
        ranks=asked.ranks,
        notes=tuple(notes),
        parameters=sum(g.count * g.layer.parameters for g in asked.groups())
        + (sum(t.elements for t in asked.model.embeddings) if asked.whole else 0),
    )


@cache
def _framework(name: str) -> Framework:
    """The row of that key: the folder of frameworks is looked through once for each."""
    return frameworks.get(name)


def _margin(found: Answer, asked: Question, sizes: Mapping[str, int]) -> int:
    """How far the total may be off: what is closed form counts little."""
    sure = sum(sizes.get(name, 0) for name in ("weights", "scales", "embeddings", "kv_cache"))
    margin = round(found.spread * (sum(sizes.values()) - sure) + 0.001 * sure)
    return margin + found.spread_bytes + context_spread(asked.device)


def context_spread(device: Device) -> int:
    """What an interval gains to either side where the device's context was not measured."""
    if device.is_cpu or device.context_measured:
        return 0
    return _NEAR_SPREAD if device.capability == _KNOWN_CAPABILITY else _FAR_SPREAD


def _as_stored(entries: list[Entry], held: Checkpoint, ranks: int) -> list[Entry]:
    """Weights from the checkpoint's headers: exact on one rank, shared out over more."""
    kept = [e for e in entries if e.category not in ("weights", "scales", "embeddings")]
    sizes = {"weights": held.weights, "scales": held.scales, "embeddings": held.around}
    if ranks > 1:
        return entries
    return kept + [Entry(name, size, Known.TOLD) for name, size in sizes.items()]


def rules() -> tuple[str, ...]:
    """Frameworks that have rules of prediction, in the order of their keys."""
    return frameworks.names()


__all__ = [
    "CPU",
    "UnpredictableError",
    "answer",
    "context_spread",
    "device_of",
    "question",
    "rules",
]
