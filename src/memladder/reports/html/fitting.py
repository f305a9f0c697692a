"""The predictor's answers as tables, so that the page can say what fits without asking anybody.

A table has a prediction for each batch and context of a grid; nothing is interpolated, so that the
page says what `memladder predict` says, or nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memladder.core.errors import UsageError
from memladder.frameworks._rules.question import Device, UnpredictableError
from memladder.predictor import gpus, predict
from memladder.predictor.fit import LOSS, rows_of
from memladder.predictor.model import Model

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# Least compute capabilities of generations, the newest first, by which these rows differ.
_GENERATIONS = ((9, 0), (8, 9), (8, 0), (0, 0))
_BY_GENERATION = ("ladder", "torchao_fp8_fp8")


def tables(models: tuple[Model, ...]) -> dict[str, Any]:
    """GPUs, grid, and for each model and row its bytes: one list a batch, one entry a context.

    `spread` of a GPU is what a prediction's interval gains on it, on either side, because its
    context was not measured.
    """
    return {
        "batches": list(BATCHES),
        "contexts": list(CONTEXTS),
        "loss": list(LOSS),
        "gpus": [
            {
                "name": gpu.name,
                "usable": gpu.usable_bytes,
                "context": gpu.context_bytes,
                "spread": predict.context_spread(predict.device_of(gpu)),
                "generation": _generation(gpu),
            }
            for gpu in gpus.table()
        ],
        "models": [_model(model) for model in models],
    }


def _generation(gpu: gpus.Gpu) -> int:
    """Where its generation is in the lists of tables; a list of one is for all."""
    capability = gpu.capability or _GENERATIONS[0]
    return next(place for place, least in enumerate(_GENERATIONS) if capability >= least)


def _model(model: Model) -> dict[str, Any]:
    measured = predict.device_of(gpus.find("H100"))
    found = []
    for name, form, setting in rows_of(model):
        kinds = _GENERATIONS if name.startswith(_BY_GENERATION) else _GENERATIONS[:1]
        made = [
            _table(model, name, setting, replace(measured, capability=least)) for least in kinds
        ]
        found.append({"framework": name, "format": form, "tables": made})
    return {"name": model.name, "positions": model.architecture.positions, "rows": found}


def _table(model: Model, name: str, setting: str | None, device: Device) -> dict[str, Any]:
    """Bytes and what the interval is wide to either side; or why there is no answer."""
    settings = {"weight_format": setting} if setting else {}
    totals, margins = [], []
    try:
        for batch in BATCHES:
            made = [
                predict.answer(
                    model,
                    name,
                    predict.question(
                        model, device, batch_size=batch, seq_len=1, past=context - 1, layers=None,
                        settings=settings,
                    ),
                )
                for context in CONTEXTS
            ]  # fmt: skip
            totals.append([one.total_bytes for one in made])
            margins.append([one.high_bytes - one.total_bytes for one in made])
    except (UnpredictableError, UsageError) as error:
        return {"reason": str(error)}
    return {"totals": totals, "margins": margins}
