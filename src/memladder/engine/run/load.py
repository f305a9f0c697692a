"""From a packed folder to a model that runs: what it would take, and then taking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from memladder import formats
from memladder.core.errors import UsageError
from memladder.core.units import format_bytes
from memladder.engine.packed import folder as folders
from memladder.engine.packed import packed_layer, rest
from memladder.engine.packed.folder import Index
from memladder.engine.packed.packed_layer import PackedLayer, Weights
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.model import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LEARNED,
    NUMBERS,
    Around,
)
from memladder.engine.program.steps import CHUNK
from memladder.engine.run import driver
from memladder.engine.run.layer import activation_format, torch_device, use_tuned_cuts
from memladder.engine.run.model import Limits, RunnableModel
from memladder.engine.run.stage import Stage, StagePlan
from memladder.formats._shared.base import Format

T = TypeVar("T")

CONTEXT = 4096
"""Tokens of a sequence where none are asked for, or the model's own limit if that is less."""


def load_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    devices: Sequence[str | torch.device] | None = None,
    context: int | None = None,
    batch_size: int = 1,
    chunk: int = CHUNK,
    cache_format: str = "fp16",
    activation: str | None = None,
    every_logits: bool = False,
    verify: bool = False,
) -> RunnableModel:
    """A model packed by `memladder quantize --all`, ready to answer.

    `device` is `cpu` or `cuda:N`, by default a GPU where there is one; `devices` are several, over
    which the layers are divided in order. `context`: tokens of a sequence, prompt and answer
    together; `batch_size`: sequences at once; `chunk`: tokens of a run at the most. The cache of
    all of them is taken now, in `cache_format` (fp16, fp8, int8). `activation` as in `load_layer`.
    With `every_logits` a run gives the logits of all of its tokens. Files are held against their
    digests: all of them are read where one has changed since it was last read, by its size, times
    and inode, and where `verify` asks for it.

    Raises FormatError for a folder that is none, and UsageError for numbers that are none, for
    devices that are not here, and for one that is too small: what would fit is said then.
    """
    folder = Path(path)
    index = folders.opened(folder)
    folders.verify(folder, index, verify)
    if device is not None and devices is not None:
        raise UsageError("device and devices are given; give one of them")
    places = [torch_device(one) for one in devices] if devices else [torch_device(device)]
    limits = _limits(index, context, batch_size, chunk)
    packed = [packed_layer.load(folder / one.file) for one in index.layers]
    own = rest.load(folder / index.rest.file, index.rest_contents()) if index.rest else None
    assert own is not None
    parts = _Parts(index, packed, own, _activation(index, activation))
    plans = parts.plans(limits, len(places), cache_format, every_logits)
    for place in dict.fromkeys(places):
        if place.type == "cuda" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            driver.lean_context(place.index or 0)
        _require_room(place, places, plans, parts, limits)
    stages = [
        Stage(planned, place, _placed(parts.weights(planned), place), _allocator(place))
        for planned, place in zip(plans, places, strict=True)
    ]
    return RunnableModel(folder, stages, limits, index.ends.vocabulary)


@dataclass(frozen=True)
class _Parts:
    """A packed model's files, mapped."""

    index: Index
    layers: Sequence[PackedLayer]
    rest: Weights
    activation: Format | None

    def plans(self, limits: Limits, stages: int, cache_format: str, every: bool) -> list[StagePlan]:
        """One for each device."""
        names = frozenset((*self.rest.matrices, *self.rest.vectors))
        found = []
        for stage, numbers in enumerate(self._divided(stages)):
            around = Around(self.index.ends, names, stage == 0, stage + 1 == stages, every)
            layers = [
                (number, self.layers[number].form, self._cache(number, limits, cache_format))
                for number in numbers
            ]
            found.append(
                StagePlan(layers, around, self.activation, limits.batch_size, limits.chunk)
            )
        return found

    def _cache(self, number: int, limits: Limits, cache_format: str) -> CacheShape:
        window = self.index.layers[number].window
        return CacheShape(limits.batch_size, limits.context, limits.chunk, cache_format, window)

    def _divided(self, stages: int) -> list[range]:
        """Layers in order, about the same bytes on each of the devices, one at least."""
        sizes = [layer.nbytes for layer in self.layers]
        if not 1 <= stages <= len(sizes):
            raise UsageError(f"{stages} devices for {len(sizes)} layers; each has one at least")
        ends = [0]
        for stage in range(1, stages):
            most = len(sizes) - (stages - stage)
            end = ends[-1] + 1
            while end < most and sum(sizes[: end + 1]) <= sum(sizes) * stage / stages:
                end += 1
            ends.append(end)
        return [range(a, b) for a, b in pairwise([*ends, len(sizes)])]

    def weights(self, planned: StagePlan) -> Weights:
        """The stage's, by the names that its programs have for them."""
        own = {f"{number}.": self.layers[number] for number, *_ in planned.layers}
        ends = planned.around
        head = EMBEDDING if self.index.ends.is_tied else HEAD
        read = {EMBEDDING, NUMBERS, LEARNED, "embedding_norm"} if ends.first else set()
        read |= {head, HEAD_BIAS, "final_norm"} if ends.last else set()

        def wanted(held: Mapping[str, T]) -> dict[str, T]:
            return {k: v for k, v in held.items() if k in read or k.rpartition(".")[0] in read}

        matrices = wanted(self.rest.matrices)
        vectors = wanted(self.rest.vectors)
        for prefix, layer in own.items():
            matrices |= {prefix + name: matrix for name, matrix in layer.matrices.items()}
            vectors |= {prefix + name: vector for name, vector in layer.vectors.items()}
        return Weights(matrices, vectors)

    def bytes_in(self, planned: StagePlan, spec: str) -> int:
        """Of the stage's weights, if its layers' matrices were in another format."""
        kind, fp16 = formats.get(spec), formats.get("fp16")
        now = sum(self.layers[number].nbytes for number, *_ in planned.layers)
        other = sum(
            replace(form, format=kind, others=dict.fromkeys(form.others, fp16)).nbytes
            for _, form, _ in planned.layers
        )
        return packed_layer.device_bytes(self.weights(planned)) - now + other


def _placed(weights: Weights, device: torch.device) -> Weights:
    """As they are on the CPU, a copy in one block on a GPU."""
    if device.type == "cpu":
        return weights
    use_tuned_cuts()
    return packed_layer.on_device(weights, _allocator(device)(packed_layer.device_bytes(weights)))


def _allocator(device: torch.device) -> Callable[[int], Tensor]:
    def allocate(nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise UsageError(
                f"{device} has no {format_bytes(nbytes)} in one piece: "
                f"{' '.join(str(error).split())[:120]}"
            ) from None

    return allocate


def _activation(index: Index, spec: str | None) -> Format | None:
    return activation_format(spec or formats.get(index.options.format).activation)


def _limits(index: Index, context: int | None, batch_size: int, chunk: int) -> Limits:
    known = _longest(index)
    if context is None:
        context = min(CONTEXT, known) if known else CONTEXT
    for name, value in (("context", context), ("batch_size", batch_size), ("chunk", chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 24:
            raise UsageError(
                f"{name} {str(value)[:40]!r} is not a whole number from 1 to {1 << 24}"
            )
    if known and context > known:
        raise UsageError(f"a context of {context} tokens; this model knows positions up to {known}")
    return Limits(batch_size, context, min(chunk, context))


def _longest(index: Index) -> int | None:
    """Tokens that the model has positions for; None where its configuration names no limit."""
    if index.ends.positions is not None:
        return index.sizes[index.ends.positions][0] - index.ends.offset
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = index.config.get(name)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _require_room(
    place: torch.device,
    devices: Sequence[torch.device],
    plans: Sequence[StagePlan],
    parts: _Parts,
    limits: Limits,
) -> None:
    """Raise UsageError, before anything is loaded, where a GPU has too little memory free."""
    if place.type == "cpu":
        return
    own = [planned for planned, other in zip(plans, devices, strict=True) if other == place]
    weights = sum(packed_layer.device_bytes(parts.weights(planned)) for planned in own)
    cache = sum(planned.cache_bytes for planned in own)
    arena = sum(planned.arena_bytes(place) for planned in own)
    free = torch.cuda.mem_get_info(place)[0]
    needed = weights + cache + arena
    if needed <= free:
        return
    left = free - weights - arena
    context = limits.context * left // cache if left > 0 else 0
    fits = [
        name
        for name in ("fp8", "int4", "int1")
        if sum(parts.bytes_in(planned, name) for planned in own) + cache + arena <= free
    ]
    advice = [f"a context of {context} tokens would fit"] if context > 0 else []
    advice += [f"format {fits[0]} would fit"] if fits else []
    raise UsageError(
        f"{place} has {format_bytes(free)} free and {format_bytes(needed)} are needed: weights "
        f"{format_bytes(weights)}, cache {format_bytes(cache)} for {limits.batch_size} × "
        f"{limits.context} tokens, activations {format_bytes(arena)}; "
        f"{' or '.join(advice) or 'no format and no context would fit'}"
    )
