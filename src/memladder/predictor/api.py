"""`memladder.predict` and `memladder.fit`: what the commands do, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from memladder import frameworks
from memladder.core.errors import UsageError
from memladder.core.prediction import Prediction
from memladder.frameworks._rules.question import Device, UnpredictableError
from memladder.predictor import fit as fitting
from memladder.predictor import gpus, model
from memladder.predictor import predict as predicting
from memladder.predictor.fit import Fit


def predict(
    model_name: str | Path,
    framework: str,
    *,
    batch_size: int = 1,
    seq_len: int = 1,
    past: int = 0,
    layers: int | str = 1,
    gpu: str | None = None,
    free: str | None = None,
    tensor_parallel: int = 1,
    kv_format: str = "auto",
    version: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Prediction:
    """What a case would take, in bytes by category, without weights, GPU or torch.

    `model_name` is `llama`, `bloom`, a `config.json` or its folder; `layers` a number or `all`.
    `gpu` is a name of the table, or `cpu`; `free` a size such as `18GiB` instead. With
    `tensor_parallel` above 1 the bytes are one GPU's. `settings` are the framework's own
    (`gpu_memory_utilization`, `max_num_seqs`, …). Raises UsageError, ConfigError, and
    UnavailableError where the framework's rules have no answer.
    """
    found = model.find(str(model_name))
    asked = predicting.question(
        found,
        device(gpu, free),
        batch_size=batch_size,
        seq_len=seq_len,
        past=past,
        layers=scope(layers),
        ranks=tensor_parallel,
        cache_format=kv_format,
        version=version,
        settings=settings,
    )
    return predicting.answer(found, framework, asked)


def predict_all(model_name: str | Path, **given: object) -> tuple[list[Prediction], dict[str, str]]:
    """The predictions of all frameworks, and the reasons of those that have none."""
    answered, reasons = [], {}
    for name in frameworks.names():
        try:
            answered.append(predict(model_name, name, **given))  # type: ignore[arg-type]
        except UnpredictableError as error:
            reasons[name] = str(error)
    return answered, reasons


def fit(
    model_name: str | Path,
    gpu_names: str | Sequence[str],
    *,
    gpu_count: int = 1,
    batch_size: int = 1,
    context: int = 4096,
    kv_format: str = "auto",
) -> tuple[Fit, ...]:
    """Which frameworks and formats fit on which GPUs, the room left, and how much further it goes.

    A GPU is a name of the table, `8xH100` for several of a host; `gpu_count` counts where a name
    does not. Raises UsageError and ConfigError.
    """
    names = [gpu_names] if isinstance(gpu_names, str) else list(gpu_names)
    wanted = []
    for name in names:
        gpu, count = gpus.find_counted(name)
        wanted.append((gpu, count if count > 1 else gpu_count))
    if not wanted:
        raise UsageError("no GPU is named")
    return fitting.fit(
        model.find(str(model_name)),
        wanted,
        batch_size=batch_size,
        context=context,
        cache_format=kv_format,
    )


def device(gpu: str | None, free: str | None) -> Device:
    """The device of a name or of a free size. Raises UsageError."""
    if gpu is not None and free is not None:
        raise UsageError("give a GPU or what is free, not both")
    if gpu is not None and gpu.strip().lower() == "cpu":
        return predicting.CPU
    if free is not None:
        return predicting.device_of(gpus.of_size(free))
    return predicting.device_of(gpus.find(gpu or "H100"))


def scope(layers: int | str) -> int | None:
    """None for `all`. Raises UsageError."""
    if isinstance(layers, int):
        return layers
    text = layers.strip().lower()
    if text == "all":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"layers {layers[:40]!r} is not a whole number, or all")
    return int(text)
