"""What a `config.json` alone says of a whole decoder: its tensors and its cache, layer by layer.

No weights, no torch, no transformers. Layers that are alike are one `LayerGroup`; a model is its
groups, the tables around them, and a vision or audio tower that is counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memladder.core.errors import ConfigError
from memladder.core.serial import StrEnum


class Split(StrEnum):
    """How tensor parallelism divides a tensor over ranks."""

    ROWS = "rows"
    COLUMNS = "columns"
    KV_HEADS = "kv_heads"
    """By heads of keys and values; where there are fewer than ranks, ranks hold copies."""
    VOCABULARY = "vocabulary"
    """By rows, after padding to a multiple of 64."""
    NONE = "none"
    """Every rank has all of it."""


@dataclass(frozen=True)
class TensorSpec:
    """One parameter, or `count` alike (experts). A matrix is [out, in]; a vector is [size].

    `linear`: a format of linear layers' weights takes it; embeddings, norms and routers stay.
    """

    name: str
    shape: tuple[int, ...]
    split: Split = Split.NONE
    linear: bool = False
    count: int = 1

    @property
    def elements(self) -> int:
        """Numbers in all of them."""
        return self.count * math.prod(self.shape)

    def elements_of_rank(self, ranks: int, kv_heads: int) -> int:
        """Numbers that one of `ranks` holds, the largest share."""
        if ranks == 1 or self.split is Split.NONE:
            return self.elements
        size = self.shape[0]
        if self.split is Split.COLUMNS:
            size = self.shape[-1]
        if self.split is Split.KV_HEADS:
            share = size // kv_heads * max(-(-kv_heads // ranks), 1)
        elif self.split is Split.VOCABULARY:
            share = -(-size // (64 * ranks)) * 64
        else:
            share = -(-size // ranks)
        return self.elements // size * share


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps of earlier tokens.

    Keys and values of `kv_heads` heads, or one latent vector of `latent` numbers a token (MLA,
    which every rank holds whole), of the last `window` tokens where one is given; or a state of
    `state` + `conv` numbers a sequence, whatever its length. `indexer` numbers a token choose
    among the rest (DeepSeek-V3.2). `shared`: the layer reads another layer's cache.
    """

    kv_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    latent: int = 0
    indexer: int = 0
    window: int | None = None
    state: int = 0
    conv: int = 0
    shared: bool = False

    def token_elements(self, ranks: int = 1) -> int:
        """Numbers a token that one of `ranks` keeps."""
        if self.shared:
            return 0
        heads = max(-(-self.kv_heads // ranks), 1) if self.kv_heads else 0
        return heads * (self.key_size + self.value_size) + self.latent

    def sequence_elements(self, ranks: int = 1) -> tuple[int, int]:
        """Numbers a sequence, of its length independent: of the convolution, of the state."""
        return -(-self.conv // ranks), -(-self.state // ranks)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its tensors, its cache, and the widths that activations have."""

    kind: str
    tensors: tuple[TensorSpec, ...]
    cache: CacheSpec
    heads: int
    head_size: int
    inner: int
    experts: int = 0
    experts_per_token: int = 0
    expert_inner: int = 0
    gated: bool = True

    @property
    def parameters(self) -> int:
        """Of the layer."""
        return sum(tensor.elements for tensor in self.tensors)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are alike, by their numbers in the model."""

    numbers: tuple[int, ...]
    layer: LayerSpec

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.numbers)


@dataclass(frozen=True)
class Architecture:
    """A decoder as its configuration describes it.

    `embeddings` are tables and head, the norms around the layers among them; `towers` are
    parameters of what is no text: they are estimates. `positions` is 0 where nothing bounds them.
    `rotary` are (positions, width) of the tables of angles that engines keep.
    """

    family: str
    hidden_size: int
    vocabulary: int
    positions: int
    groups: tuple[LayerGroup, ...]
    embeddings: tuple[TensorSpec, ...]
    tied: bool
    dtype: str
    rotary: tuple[tuple[int, int], ...] = ()
    towers: int = 0
    quantisation: Mapping[str, Any] | None = None
    alibi: bool = False

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return sum(group.count for group in self.groups)

    @property
    def parameters(self) -> int:
        """Of the text part: layers, tables, head."""
        around = sum(tensor.elements for tensor in self.embeddings)
        return around + sum(group.count * group.layer.parameters for group in self.groups)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; 1 where no layer has any."""
        return max((group.layer.cache.kv_heads for group in self.groups), default=0) or 1

    def widest(self) -> LayerSpec:
        """The layer with the most parameters."""
        return max((group.layer for group in self.groups), key=lambda layer: layer.parameters)


def grouped(layers: list[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Equal layers together, in the order in which each kind comes first."""
    numbers: dict[LayerSpec, list[int]] = {}
    for number, layer in enumerate(layers):
        numbers.setdefault(layer, []).append(number)
    return tuple(LayerGroup(tuple(found), layer) for layer, found in numbers.items())


def require(holds: bool, text: str) -> None:
    """Raise ConfigError unless it holds."""
    if not holds:
        raise ConfigError(text)
