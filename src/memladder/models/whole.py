"""A causal language model, or the first of its layers, filled: embeddings, layers, norm, head.

Each layer has memory of its own. Where making other values for every layer would take long, all
layers of a group have the values of one; what a model takes does not depend on them.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memladder.core.case import Workload
from memladder.models import (
    LayerConfig,
    ModelConfig,
    cache,
    capture,
    layer,
    parameters,
    past,
    tensor_shapes,
    weights,
)
from memladder.models.capture import Decoder

Fill = Callable[[nn.Module, LayerConfig, Path], None]
"""Puts a layer's weights, of a file, into its block."""

_ITEM_BYTES = 2
# Layers whose values are made one by one take no more than this.
_OWN_BYTES = 256 << 20
_RECIPE = "1"


@dataclass(frozen=True)
class Source:
    """A model and how much of it: its first `count` layers. `seed` makes its values."""

    model: ModelConfig
    count: int
    cache_dir: Path
    seed: int

    @property
    def repeated(self) -> bool:
        """Do all layers of a group have the same values?"""
        return _ITEM_BYTES * sum(map(parameters, self.layers())) > _OWN_BYTES

    def layers(self) -> list[LayerConfig]:
        """The configuration of each layer, in order."""
        return [self.model.layer(number) for number in range(self.count)]

    def around(self) -> LayerConfig:
        """What is around the layers, as if it were one."""
        return self.model.around_config

    def files(self) -> list[Path]:
        """The file of each layer's weights, made if it is not there yet."""
        return [
            weights.ensure(one, self.cache_dir, self.seed if self.repeated else self.seed + number)
            for number, one in enumerate(self.layers())
        ]

    def prepare(self, workload: Workload) -> None:
        """Make all files that a session reads."""
        self.files()
        weights.ensure(self.around(), self.cache_dir, self.seed)
        if workload.past:
            self.pasts(workload.past)

    def pasts(self, tokens: int) -> list[Path]:
        """The file of each layer's past. With values of their own layers have pasts of their own:
        those of the whole model in float32."""
        if self.repeated:
            found = [past.ensure(x, self.cache_dir, tokens, self.seed) for x in self.layers()]
        else:
            found = self._exact_pasts(tokens)
        return found

    def _exact_pasts(self, tokens: int) -> list[Path]:
        folder = cache.layer_dir(self.around(), self.cache_dir, self.seed)
        names = [
            folder / f"past-{tokens}-{number}of{self.count}-{_RECIPE}.safetensors"
            for number in range(self.count)
        ]
        if all(path.exists() for path in names):
            return names
        for one in self.layers():
            past.require_keys(one)
        made = Whole(self, Workload(1, tokens), torch.float32, torch.device("cpu"))
        kept = _everything(made)
        with cache.writing(folder):
            for path, (keys, values) in zip(names, kept, strict=True):
                with cache.replacing(path) as part:
                    # A view of a larger tensor can't be saved.
                    save_file({"keys": keys.half().clone(), "values": values.half().clone()}, part)
        return names


class Whole:
    """transformers' own model on a device, filled.

    `blocks` are its layers. With a past, `cache` is its static cache, and `kept` the layers' parts
    of that, full of the past.
    """

    def __init__(
        self,
        source: Source,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
        fill: Fill | None = None,
    ) -> None:
        self.source, self.workload = source, workload
        self.decoder = Decoder(source.model.family, source.model.values)
        self.model: Any = self.decoder.model
        self.blocks = self.decoder.blocks
        del self.blocks[source.count :]
        self._dtype, self._device = dtype, device
        for block, config, path in zip(self.blocks, source.layers(), source.files(), strict=True):
            (fill or self.fill)(block, config, path)
            gc.collect()
        self._fill_around()
        self.model.to(device)
        self.cache: Any = None
        self.kept: list[Any] = []
        if workload.past:
            self._fill_cache()

    def fill(self, block: nn.Module, config: LayerConfig, path: Path) -> None:
        """Each parameter in memory of its own, on the device."""
        for name in tensor_shapes(config):
            owner, _, leaf = name.rpartition(".")
            parameter = read(path, name, self._dtype, self._device)
            block.get_submodule(owner)._parameters[leaf] = parameter

    def _fill_around(self) -> None:
        """Tied parameters stay one."""
        source = self.source
        path = weights.ensure(source.around(), source.cache_dir, source.seed)
        places = [
            (module, leaf, parameter)
            for module in self.model.modules()
            for leaf, parameter in module._parameters.items()
        ]
        named = self.decoder.around()
        for name, replaced in named.items():
            filled = read(path, name, self._dtype, self._device)
            for module, leaf, parameter in places:
                if parameter is replaced:
                    module._parameters[leaf] = filled

    def _fill_cache(self) -> None:
        source, workload = self.source, self.workload
        self.cache = self.decoder.static_cache(workload.length)
        for config, kept in zip(source.layers(), self.cache.layers, strict=False):
            layer.allocate(kept, config, workload, self._dtype, self._device)
            self.kept.append(kept)
        self.remember()

    def remember(self) -> None:
        """Put the past into the cache."""
        files = self.source.pasts(self.workload.past)
        for kept, file in zip(self.kept, files, strict=True):
            past.fill(file, kept, self.workload.past)

    def own_cache(self, number: int) -> Any:
        """A cache that has the layer's part alone, where the first of its group looks for it."""
        if self.cache is None:
            return None
        own = copy.copy(self.cache)
        first = self.source.model.layer(number).number
        own.layers = [*([None] * first), self.kept[number]]
        return own

    def rewind(self) -> None:
        """Let the cache hold the past, and no token of a pass."""
        for kept in self.kept:
            capture.set_length(kept, self.workload.past)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch_size, 1, vocab_size] of each sequence's last token, or of all new ones
        where the model makes no fewer."""
        named: dict[str, Any] = {"use_cache": self.cache is not None}
        if self.cache is not None:
            named[capture.cache_name(self.model)] = self.cache
        if self.makes_last:
            named["logits_to_keep"] = 1
        logits: Tensor = self.model(input_ids=ids, **named).logits
        return logits

    @property
    def makes_last(self) -> bool:
        """Can the model make the logits of the last token alone?"""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def block_parameters(self) -> Iterator[Tensor]:
        """Parameters of the layers."""
        for block in self.blocks:
            yield from block.parameters()

    def around_bytes(self) -> int:
        """Bytes of the parameters outside the layers, tied ones once."""
        return sum(parameter.nbytes for parameter in self.decoder.around().values())


def read(path: Path, name: str, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A file's tensor in memory of its own."""
    with safe_open(path, framework="pt", device="cpu") as file:
        mapped = file.get_tensor(name)
        tensor = mapped.to(device=device, dtype=dtype)
        if tensor is mapped:
            tensor = mapped.clone()
    return nn.Parameter(tensor, requires_grad=False)


def token_ids(source: Source, workload: Workload) -> np.ndarray:
    """Tokens of whole sequences, int64 [batch_size, length]; all have the same past."""
    vocabulary = source.model.vocab_size
    generator = np.random.default_rng([source.seed, 1])
    earlier = generator.integers(0, vocabulary, (1, workload.past))
    new = generator.integers(0, vocabulary, (workload.batch_size, workload.seq_len))
    return np.concatenate([np.repeat(earlier, workload.batch_size, axis=0), new], axis=1)


def reference(source: Source, workload: Workload, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The logits in float32 when past and new tokens pass at once, of those tokens that a
    session's logits are of. On the CPU."""
    at_once = Workload(workload.batch_size, workload.length)
    made = Whole(source, at_once, dtype, torch.device("cpu"))
    ids = torch.from_numpy(token_ids(source, workload))
    with torch.inference_mode():
        logits = made(ids)
    kept = logits if made.makes_last else logits[:, workload.past :]
    found: np.ndarray = kept.float().numpy()
    return found


def _everything(made: Whole) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that each layer writes for all tokens of the model's one sequence."""
    from transformers import DynamicCache

    workload = made.workload
    # Without a configuration all layers keep all tokens, windows too.
    kept = DynamicCache()
    given = token_ids(made.source, Workload(1, 1, workload.seq_len))[:, : workload.seq_len]
    named = {capture.cache_name(made.model): kept, "use_cache": True}
    with torch.inference_mode():
        made.model(input_ids=torch.from_numpy(given), **named)
    return [(one.keys, one.values) for one in kept.layers]


def settings(source: Source, workload: Workload) -> Mapping[str, str | int]:
    """What a reader must know of the model's values."""
    found: dict[str, str | int] = {
        "layers": source.count,
        "weights": "repeated" if source.repeated else "own",
    }
    if workload.past:
        found["past"] = "of one layer, repeated" if source.repeated else "own"
    return found
