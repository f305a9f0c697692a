"""A decoder layer of a local Hugging Face checkpoint: its configuration, and where its tensors are.

A checkpoint is a folder with `config.json` and safetensors files: `model.safetensors`, or shards
named by `model.safetensors.index.json`, or a single file of any name. Nothing is downloaded,
nothing is unpickled, no code of a checkpoint runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from memladder import models
from memladder.core.errors import ConfigError, FormatError, UsageError
from memladder.engine.packed import packed_layer, packing
from memladder.models import LayerConfig, catalogue, fields
from memladder.models.cache import default_dir

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DTYPES = ("F16", "BF16", "F32")
# What models of old have stored beside their weights, and compute themselves.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
# The index of a model of a trillion parameters has 10 MB.
_MAX_JSON_BYTES = 64 << 20

# What files call a tensor that transformers has renamed since.
_OTHER_NAMES = {"lm_head.weight": ("embed_out.weight",)}

Places = dict[str, Path]
"""The file of each tensor, by the name that the tensor has there."""


@dataclass(frozen=True)
class CheckpointLayer:
    """A layer whose tensors are all there, in shape and dtype. Values are read when asked for."""

    config: LayerConfig
    number: int
    places: Mapping[str, tuple[Path, str]]

    def rows(self) -> packing.Rows:
        """What `packing.pack` reads."""
        return packing.reader(self.places.__getitem__)


@dataclass(frozen=True)
class Checkpoint:
    """All of a checkpoint. `raw` is what `config.json` says; `tensors` the file of each tensor."""

    folder: Path
    raw: Mapping[str, Any]
    layers: tuple[CheckpointLayer, ...]
    tensors: Mapping[str, Path]

    @property
    def digest(self) -> str:
        """64 hexadecimal digits that differ where the configuration or a file is another one."""
        files = [
            [path.name, (stat := path.stat()).st_size, stat.st_mtime_ns]
            for path in sorted(set(self.tensors.values()))
        ]
        text = json.dumps([self.raw, sorted(self.tensors), files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def outside(self, names: Iterable[str]) -> Outside:
        """Tensors beside the layers, by the names that transformers has for them. Raises
        FormatError."""
        found = {}
        for name in names:
            # Files of some families leave out what the whole decoder is called.
            known = (name, name.partition(".")[2], *_OTHER_NAMES.get(name, ()))
            stored = next((one for one in known if one in self.tensors), None)
            if stored is None:
                raise FormatError(f"{self.folder}: tensor {name} is missing")
            found[name] = self.tensors[stored], stored
        shapes = {}
        for name, (path, stored) in found.items():
            with packed_layer.opened(path) as file:
                there = set(file.keys())
                if stored not in there:
                    raise FormatError(f"{path}: tensor {stored} is missing, which the index has")
                shapes[name] = _shape(path, stored, file.get_slice(stored))
        return Outside(found, shapes)


@dataclass(frozen=True)
class Outside:
    """Tensors beside the layers: where each is, and its shape."""

    places: Mapping[str, tuple[Path, str]]
    shapes: Mapping[str, tuple[int, ...]]

    def rows(self) -> packing.Rows:
        """What `rest.pack` reads."""
        return packing.reader(self.places.__getitem__)


def open_all(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, of any family that transformers builds, and all of its layers.

    Raises as `open_layer` does.
    """
    try:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; a local checkpoint is wanted")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: no config.json there, so it is no checkpoint")
        raw, tensors = _json(folder / "config.json"), _tensors(folder)
        model = catalogue.read(folder / "config.json", default_dir())
        if model.quantization is not None:
            raise ConfigError(
                f"{folder}: quantised by {model.quantization!r} already; give the one it is made of"
            )
        layers = []
        for number in range(model.layer_count):
            config = model.layer(number)
            places = _found(config, number, folder, tensors)
            _check(config, places)
            layers.append(CheckpointLayer(config, number, places))
        beyond = _prefixes(model.layer(0), model.layer_count, tensors)
        if beyond:
            raise FormatError(
                f"{folder}: tensors of {beyond[0][:80]!r}; by config.json there are "
                f"{model.layer_count} layers"
            )
    except OSError as error:
        raise FormatError(f"{folder}: {error.strerror or error}") from None
    return Checkpoint(folder, raw, tuple(layers), tensors)


def _found(
    config: LayerConfig, number: int, folder: Path, tensors: Places
) -> dict[str, tuple[Path, str]]:
    """File and name there of each of the layer's tensors: all that begin alike."""
    prefixes = _prefixes(config, number, tensors)
    if len(prefixes) != 1:
        told = f": {', '.join(prefixes)[:200]}" if prefixes else ""
        raise FormatError(f"{folder}: layer {number} is there {len(prefixes)} times{told}")
    return _named_by(prefixes[0], config, number, folder, tensors)


def _prefixes(config: LayerConfig, number: int, tensors: Places) -> list[str]:
    """With what the names of a layer's tensors may begin, by any of the layer's own names."""
    wanted = models.tensor_shapes(config)
    found = set()
    for name in tensors:
        before, mark, inner = f".{name}".partition(f".{number}.")
        if mark and inner in wanted:
            found.add(f"{before}{mark}"[1:])
    return sorted(found)


def open_layer(folder: Path, number: int) -> CheckpointLayer:
    """Layer `number`, from 0, of the checkpoint in `folder`.

    Raises UsageError for a folder or a layer that is not there, ConfigError for a configuration
    and FormatError for files that can't be used.
    """
    try:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; a local checkpoint is wanted")
        config, count = _described(folder / "config.json")
        if not 0 <= number < count:
            raise UsageError(f"{folder} has layers 0 … {count - 1}, not {number}")
        places = _layer(config, number, folder, _tensors(folder))
        _check(config, places)
    except OSError as error:
        raise FormatError(f"{folder}: {error.strerror or error}") from None
    return CheckpointLayer(config, number, places)


def _described(path: Path) -> tuple[LayerConfig, int]:
    """The layer's configuration, and how many layers there are."""
    if not path.is_file():
        raise ConfigError(f"{path.parent}: no config.json there, so it is no checkpoint")
    raw = _json(path)
    model = raw.get("model_type")
    if not isinstance(model, str) or model not in models.names():
        known = ", ".join(models.names())
        raise ConfigError(f"{path}: model_type {str(model)[:40]!r} is not one of {known}")
    quantised = models.quantization(raw)
    if quantised is not None:
        raise ConfigError(
            f"{path}: {quantised[0]} says that the weights are quantised already, by "
            f"{quantised[1]!r}; wanted: a model in float16, bfloat16 or float32"
        )
    try:
        count = fields.size(raw, "num_hidden_layers", "n_layer")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return models.layer_config(model, path), count


def _tensors(folder: Path) -> Places:
    """All tensors of the checkpoint; in the order in which Hugging Face looks for them."""
    if (folder / _SINGLE).exists():
        return _named(folder / _SINGLE)
    if (folder / _INDEX).exists():
        return _indexed(folder / _INDEX)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return _named(found[0])
    if found:
        raise FormatError(f"{folder}: {len(found)} safetensors files, and no {_INDEX}")
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise FormatError(f"{folder}: only pickled weights ({pickles[0]}); safetensors are read")
    raise FormatError(f"{folder}: no safetensors file there")


def _named(path: Path) -> Places:
    with packed_layer.opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _indexed(index: Path) -> Places:
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise FormatError(f"{index}: no weight_map from tensors to files")
    for shard in set(shards.values()):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or not shard.isprintable():
            raise FormatError(f"{index}: file {shard[:80]!r} is not within the folder")
    return {name: index.parent / shard for name, shard in shards.items()}


def _layer(
    config: LayerConfig, number: int, folder: Path, tensors: Places
) -> dict[str, tuple[Path, str]]:
    """File and name there of each of the layer's tensors, by its name within the layer."""
    prefixes = [text.format(number) for text in models.definition(config.model).LAYER_PREFIXES]
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        raise FormatError(
            f"{folder}: no tensor of layer {number}: none begins with {' or '.join(prefixes)}"
        )
    return _named_by(prefix, config, number, folder, tensors)


def _named_by(
    prefix: str, config: LayerConfig, number: int, folder: Path, tensors: Places
) -> dict[str, tuple[Path, str]]:
    wanted = models.tensor_shapes(config)
    for name in wanted:
        if prefix + name not in tensors:
            raise FormatError(f"{folder}: tensor {prefix}{name} is missing")
    for name in tensors:
        # A layer without one of its weights, scales or adapters would be another one.
        own = name.startswith(prefix) and name.removeprefix(prefix) not in wanted
        adapter = f".{prefix}" in name and "lora_" in name
        if adapter or (own and not name.endswith(_BUFFERS)):
            raise FormatError(
                f"{folder}: config.json knows nothing of tensor {name[:80]!r}, which belongs to "
                f"layer {number}"
            )
    return {name: (tensors[prefix + name], prefix + name) for name in wanted}


def _check(config: LayerConfig, places: Mapping[str, tuple[Path, str]]) -> None:
    """Raise FormatError unless every tensor is in its file, with its shape, as float numbers."""
    shapes = models.tensor_shapes(config)
    files = defaultdict(list)
    for name, (path, _) in places.items():
        files[path].append(name)
    for path, names in files.items():
        with packed_layer.opened(path) as file:
            there = set(file.keys())
            for name in names:
                stored = places[name][1]
                if stored not in there:
                    raise FormatError(f"{path}: tensor {stored} is missing, which the index has")
                shape = _shape(path, stored, file.get_slice(stored))
                if shape != shapes[name]:
                    raise FormatError(
                        f"{path}: tensor {stored} is of shape {list(shape)}; "
                        f"by config.json it is {list(shapes[name])}"
                    )


def _shape(path: Path, name: str, tensor: Any) -> tuple[int, ...]:
    """Raises FormatError unless it is of float numbers."""
    if tensor.get_dtype() not in _DTYPES:
        raise FormatError(
            f"{path}: tensor {name} is {tensor.get_dtype()}; {', '.join(_DTYPES)} can be read"
        )
    return tuple(tensor.get_shape())


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConfigError(f"{path}: too large")
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return raw
