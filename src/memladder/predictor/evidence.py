"""Predictions held against what was measured after them: sealed files, and their errors.

A sealed file holds predictions, and its SHA-256 is committed before the cells are measured: held
out means held out.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memladder import __version__
from memladder.core.errors import MemladderError, RecordError
from memladder.core.files import write_atomic
from memladder.core.prediction import SCHEMA, Prediction
from memladder.core.record import Record, Status
from memladder.core.serial import from_json, to_json
from memladder.frameworks._rules.question import UnpredictableError
from memladder.models.architecture import reading
from memladder.predictor import gpus, predict
from memladder.predictor.model import Model

_MOST_BYTES = 64 << 20
# What a record of one layer does not say of its model.
_ONE_LAYER: Mapping[str, Any] = {"num_hidden_layers": 1, "vocab_size": 64}


@dataclass(frozen=True)
class Compared:
    """One measured cell and its prediction; `reason` where there is none."""

    id: str
    device: str
    measured_bytes: int
    prediction: Prediction | None
    reason: str | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one."""
        if self.prediction is None:
            return None
        return self.prediction.total_bytes / self.measured_bytes - 1

    @property
    def within(self) -> bool:
        """Whether the measurement lies in the prediction's interval."""
        found = self.prediction
        return found is not None and found.low_bytes <= self.measured_bytes <= found.high_bytes


@dataclass(frozen=True)
class Score:
    """Errors of several cells, as magnitudes; `within` counts intervals that held."""

    cells: int
    median: float
    p95: float
    largest: float
    within: int


def score(cells: Iterable[Compared]) -> Score | None:
    """The score of those that were predicted; None where none was."""
    known = [cell for cell in cells if cell.error is not None]
    errors = sorted(abs(cell.error or 0.0) for cell in known)
    if not errors:
        return None
    last = min(int(0.95 * len(errors)), len(errors) - 1)
    within = sum(cell.within for cell in known)
    return Score(len(errors), statistics.median(errors), errors[last], errors[-1], within)


def seal(path: Path, predictions: Iterable[Prediction]) -> str:
    """Write predictions; the SHA-256 of the file, to be committed before anything is measured."""
    rows = [json.dumps(to_json(found)) for found in predictions]
    head = json.dumps({"schema": SCHEMA, "memladder": __version__})
    text = head[:-1] + ', "predictions": [\n' + ",\n".join(rows) + "\n]}\n"
    write_atomic(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(path: Path) -> tuple[str, list[Prediction]]:
    """The SHA-256 of a sealed file, and its predictions. Raises RecordError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecordError(f"{path}: too large for a sealed file")
        content = path.read_bytes()
        found = json.loads(content)
        rows = found["predictions"]
        predictions = [from_json(Prediction, row) for row in rows]
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError, MemladderError) as error:
        raise RecordError(f"{path}: no sealed predictions: {str(error)[:200]}") from None
    return hashlib.sha256(content).hexdigest(), predictions


def compare(records: Iterable[Record], given: Iterable[Prediction] | None = None) -> list[Compared]:
    """Measured cells with their predictions: sealed ones by their cell, else made now."""
    held = None if given is None else {_key(found): found for found in given}
    found = []
    for record in records:
        if record.status is not Status.MEASURED:
            continue
        measured = record.steady_bytes
        assert measured is not None
        device = record.environment.machine.device if record.case.device != "cpu" else "cpu"
        prediction, reason = None, None
        try:
            prediction = _now(record, device) if held is None else held.get(_cell(record, device))
            reason = None if prediction else "not among the sealed predictions"
        except (UnpredictableError, MemladderError) as error:
            reason = str(error)
        found.append(Compared(record.case.id, device, measured, prediction, reason))
    return found


def _now(record: Record, device: str) -> Prediction:
    facts = record.layer
    if facts is None:
        raise UnpredictableError("the record does not say which layer ran")
    raw = {**_ONE_LAYER, **facts.config}
    case, shape = record.case, record.case.shape
    gpu = predict.CPU if device == "cpu" else predict.device_of(gpus.find(device))
    model = Model(case.model, reading.read(raw))
    layers = None if case.layers == "all" else int(case.layers)
    asked = predict.question(
        model, gpu, batch_size=shape.batch_size, seq_len=shape.seq_len, past=shape.past,
        layers=layers,
    )  # fmt: skip
    return predict.answer(model, case.framework, asked)


def _cell(record: Record, device: str) -> tuple[Any, ...]:
    case, shape = record.case, record.case.shape
    layers = None if case.layers == "all" else case.layers
    name = "cpu" if device == "cpu" else gpus.find(device).name
    return (case.model, case.framework, shape.batch_size, shape.seq_len, shape.past, layers, name)


def _key(found: Prediction) -> tuple[Any, ...]:
    return (
        found.model, found.framework, found.batch_size, found.seq_len, found.past, found.layers,
        found.device,
    )  # fmt: skip
