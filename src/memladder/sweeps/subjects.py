"""What is measured, read from `--model`, `--layer`, `--layers` and `--config`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from memladder import models
from memladder.core.case import ALL, MAX_LAYERS, Workload
from memladder.core.errors import UsageError
from memladder.models import LayerConfig, ModelConfig, Subject, catalogue


def parse_scope(text: str) -> int | str:
    """`all` or a number of layers. Raises UsageError."""
    digits = text.strip()
    if digits == ALL:
        return ALL
    count = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 9 else 0
    if not 1 <= count <= MAX_LAYERS:
        raise UsageError(
            f"layers {text[:40]!r} is not {ALL} or a whole number from 1 to {MAX_LAYERS}"
        )
    return count


def subjects(
    wanted: Sequence[str],
    cache_dir: Path,
    *,
    config: Path | None = None,
    layer: int | None = None,
    layers: int | str = 1,
) -> dict[str, Subject]:
    """What is measured of each model that was asked for, by its name in cases.

    Raises UsageError for a model that is none and for options that contradict each other,
    ConfigError for a file that describes no model.
    """
    if layer is not None and layers != 1:
        raise UsageError("--layer picks one layer, and --layers more of them: give one of the two")
    if config is not None and len(wanted) != 1:
        raise UsageError(
            f"--config {config} describes one model; say which with --models: {' or '.join(wanted)}"
        )
    found: dict[str, Subject] = {}
    for text in wanted:
        name = text if text in models.names() else catalogue.short_name(catalogue.config_path(text))
        if name in found:
            raise UsageError(f"two models are called {name}; their folders' names tell them apart")
        found[name] = _subject(text, cache_dir, config, layer, layers)
    return found


def _subject(
    text: str, cache_dir: Path, config: Path | None, layer: int | None, layers: int | str
) -> Subject:
    ours = text in models.names()
    if ours and layer is None and layers == 1:
        return _light(text, config)
    if not ours:
        if config is not None:
            raise UsageError(f"--config is another size of one of ours; {text} is a file itself")
        model = catalogue.read(catalogue.config_path(text), cache_dir)
    elif config is not None:
        models.layer_config(text, config)
        model = catalogue.read(config, cache_dir)
    else:
        model = catalogue.named(text, cache_dir)
    if layers != 1:
        if layers != ALL and int(layers) > model.layer_count:
            raise UsageError(f"{text} has {model.layer_count} layers, not {layers}")
        return Subject(model.usual, model, _note(model))
    chosen = model.usual if layer is None else model.layer(layer)
    return Subject(chosen, None, _note(model))


def _light(name: str, path: Path | None) -> Subject:
    """A layer of one of our families, for which nobody need be asked."""
    found: LayerConfig = models.layer_config(name, path)
    quantised = models.quantization(models.load_json(path)) if path is not None else None
    return Subject(found, None, None if quantised is None else _unquantised(quantised[1]))


def _note(model: ModelConfig) -> str | None:
    notes = [model.note] if model.note else []
    if model.quantization is not None:
        notes.append(_unquantised(model.quantization))
    return "; ".join(notes) or None


def _unquantised(method: str) -> str:
    return f"the checkpoint is quantised ({method}); measured as if it were not"


def too_long(subject: Subject, workloads: Iterable[Workload]) -> str | None:
    """A note for sequences beyond what the model was made for; None where all are within."""
    found = subject.model.max_positions if subject.model else None
    if subject.model is None:
        found = subject.config.values.get("max_position_embeddings")
    longest = max((one.length for one in workloads if one.past), default=0)
    if not isinstance(found, int) or longest <= found:
        return None
    return f"{longest} tokens are beyond max_position_embeddings, {found}"
