"""A model as its `config.json` says it: groups of alike layers, and the parts around them.

Nothing here imports torch or transformers. `catalogue` makes a `ModelConfig` of any family's file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memladder.core.case import Workload
from memladder.core.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CacheGeometry:
    """What one layer keeps of earlier tokens, as transformers' static cache keeps it.

    A key of `key_size` and a value of `value_size` numbers a token and head, of the last `window`
    tokens where one is given. `latent` is the width of the one vector a token from which all heads
    can be computed (MLA). A `recurrent` layer keeps a state of fixed size, which is not counted.

    >>> CacheGeometry(8, 128, 128).elements(Workload(2, 1, past=4095))
    16777216
    """

    kv_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None
    latent: int | None = None
    recurrent: bool = False

    def elements(self, workload: Workload) -> int:
        """Numbers kept for past and new tokens of all sequences."""
        kept = workload.length if self.window is None else min(workload.length, self.window)
        return workload.batch_size * kept * self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class LayerOutline:
    """What a layer is made of: the width of its input and output, its parameters by name, a matrix
    as [out, in], and what it keeps of earlier tokens."""

    hidden_size: int
    shapes: Shapes
    cache: CacheGeometry


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: those values of a Hugging Face `config.json` that it depends on.

    `number` is the layer's own in its model: a family's layers may differ. `outline` is None for
    the families that have a file here, which says it in closed form.
    """

    model: str
    values: Mapping[str, Any]
    number: int = 0
    outline: LayerOutline | None = None

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that differ whenever a value differs."""
        described = [self.model, self.values]
        return _digest(described if self.number == 0 else [*described, self.number])


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one model that differ in their weights alone. `layer` is the first of them."""

    numbers: tuple[int, ...]
    layer: LayerConfig

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.numbers)


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model. `around` are the parameters outside its layers: tables, norms, head.

    `family` is transformers' model type, `class_name` its class. With `tied` embeddings the table
    is the head too, and stands in `around` once. `max_positions` is None where a file names no
    limit. `quantization` is the method by which the file's checkpoint was quantised, and `note`
    tells what of a larger model was taken: both change nothing of what is described.
    """

    family: str
    class_name: str
    values: Mapping[str, Any]
    hidden_size: int
    vocab_size: int
    tied: bool
    max_positions: int | None
    layers: tuple[LayerGroup, ...]
    around: Shapes
    quantization: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        numbers = sorted(number for group in self.layers for number in group.numbers)
        if not numbers or numbers != list(range(len(numbers))):
            raise ConfigError(f"layers {numbers[:20]} are not numbered from 0, each once")

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return sum(group.count for group in self.layers)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that differ whenever a value differs."""
        return _digest([self.family, self.values])

    @property
    def around_config(self) -> LayerConfig:
        """What is around the layers, described as if it were one more of them."""
        outline = LayerOutline(self.hidden_size, self.around, CacheGeometry())
        return LayerConfig(self.family, self.values, self.layer_count, outline)

    @property
    def usual(self) -> LayerConfig:
        """The first layer of the most frequent group."""
        return max(self.layers, key=lambda group: group.count).layer

    def layer(self, number: int) -> LayerConfig:
        """The group's layer that stands for that one. Raises ConfigError."""
        for group in self.layers:
            if number in group.numbers:
                return group.layer
        raise ConfigError(f"there are layers 0 … {self.layer_count - 1}, not {number}")


@dataclass(frozen=True)
class Subject:
    """What is measured of a model: a layer, or with `model` the whole or some of its layers.

    `note` tells what of its configuration was left out.
    """

    config: LayerConfig
    model: ModelConfig | None = None
    note: str | None = None


def count_elements(shapes: Shapes) -> int:
    """Numbers in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def _digest(described: Any) -> str:
    text = json.dumps(described, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
