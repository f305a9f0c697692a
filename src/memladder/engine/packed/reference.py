"""What a packed layer should compute: Hugging Face's own module in float32 on the dequantised
weights.

Where activations are quantised, the module rounds them as the engine does: each linear layer's
input to its format, and to float16 whatever the engine keeps between its steps. The latter is
needed because rounding to 8 bits is a step function: two values that differ by a float16 rounding
land on different codes often enough that two right implementations of the same layer differ by
about 1e-2 (fp8), however exact their sums are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memladder.core.case import Workload
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.packed.sources import Source
from memladder.formats._shared.base import Format
from memladder.models import LayerConfig, tensor_shapes
from memladder.models import layer as layers
from memladder.models.weights import hidden_states

_ATTENTION = "memladder_stored_positions"
_STORED = ("query", "key", "value")


def output(
    config: LayerConfig,
    packed: PackedLayer,
    sources: Mapping[str, Source],
    shape: Workload,
    seed: int,
    activation: Format | None,
) -> np.ndarray:
    """float32 [batch_size, seq_len, hidden_size] for the hidden states of the seed.

    `sources`: of which tensors of the configuration's module the packed layer was made.
    `activation` is None where activations stay float16: nothing is rounded then. It is computed
    where the packed layer is.
    """
    module = dequantised(config, packed, sources, shape)
    device = next(module.parameters()).device
    if activation is not None:
        # The program keeps these; the others' output is changed before it is written.
        stored = {sources[name].tensor.removesuffix(".weight") for name in _STORED}
        _round(module.block, activation, stored)
    if "alibi.slopes" in packed.vectors:
        _make_alibi_relative(module, packed.vectors["alibi.slopes"])
    if "rotary.frequencies" in packed.vectors:
        _rotate_by(module, packed.vectors["rotary.frequencies"])
    states = torch.from_numpy(hidden_states(config, shape, seed)).to(device).float()
    with torch.inference_mode():
        found: np.ndarray = module(states).cpu().numpy()
    return found


def dequantised(
    config: LayerConfig, packed: PackedLayer, sources: Mapping[str, Source], shape: Workload
) -> layers.Block:
    """Hugging Face's module in float32 with the packed layer's weights, where those are."""
    module = layers.build(config, shape, torch.float32)
    for name, tensor in _tensors(config, packed, sources).items():
        layers.put(module, name, tensor)
    device = next(module.parameters()).device
    return module.to(device)


def _make_alibi_relative(module: layers.Block, slopes: Tensor) -> None:
    """ALiBi by distance, as its paper has it, and not by the key's position.

    Softmax does not tell them apart, but float32 does: positions give scores up to a thousand.
    """
    mask = module.passed("attention_mask")
    positions = torch.arange(mask.shape[-1], device=mask.device)
    distance = positions - positions.unsqueeze(1)
    module.passed("alibi").zero_()
    module.pass_on("attention_mask", mask + slopes.view(-1, 1, 1) * distance)


def _rotate_by(module: layers.Block, frequencies: Tensor) -> None:
    """Angles of the packed frequencies: RoFormer's formula, rounded once.

    transformers computes them in float32, by a power that CPUs round differently: a last bit is
    2e-4 of an angle at position 4096, enough for 8-bit codes of one token in twenty to differ.
    """
    for number, function in enumerate((torch.cos, torch.sin)):
        place = f"position_embeddings.{number}"
        held = module.passed(place)  # [1, seq_len, head_dim]
        positions = torch.arange(held.shape[-2], device=held.device).float()
        angles = positions.outer(frequencies.float()).repeat(1, 2)
        module.pass_on(place, function(angles).expand_as(held))


def _tensors(
    config: LayerConfig, packed: PackedLayer, sources: Mapping[str, Source]
) -> dict[str, Tensor]:
    """The checkpoint's tensors, put together again from what was packed."""
    device = next(iter(packed.vectors.values())).device
    # NaN, so that what was not packed shows.
    found = {
        name: torch.full(shape, torch.nan, device=device)
        for name, shape in tensor_shapes(config).items()
    }
    for name, source in sources.items():
        matrix = packed.matrices.get(name)
        rows = packed.vectors[name].float() if matrix is None else matrix.dequantise()
        _scatter(found[source.tensor], source, (rows - source.shift) / source.factor)
    return found


def _scatter(target: Tensor, source: Source, rows: Tensor) -> None:
    start = 0
    for first, last in source.runs(0, len(rows)):
        target[first:last] = rows[start : start + last - first]
        start += last - first


def _round(block: nn.Module, activation: Format, stored: set[str]) -> None:
    """Hook the block: norms read and write float16, linear layers read the format, and what
    `stored` names is written as float16."""

    def to_format(x: Tensor) -> Tensor:
        rows = x.to(torch.float16).flatten(0, -2)
        return activation.dequantise(activation.quantise(rows)).view(x.shape)

    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_on_input(to_format))
        if "norm" in name.rpartition(".")[2]:
            module.register_forward_pre_hook(_on_input(_stored))
            module.register_forward_hook(_on_output)
        if name in stored:
            module.register_forward_hook(_on_output)
    attention = getattr(block, "self_attn", None)
    if attention is not None:
        # Queries and keys are stored once more, after their rotation.
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _with_stored_positions)
        attention.config._attn_implementation = _ATTENTION


def _stored(x: Tensor) -> Tensor:
    return x.to(torch.float16).float()


def _on_input(change: Callable[[Tensor], Tensor]) -> Any:
    return lambda _, inputs: (change(inputs[0]), *inputs[1:])


def _on_output(_: nn.Module, __: Any, found: Tensor) -> Tensor:
    return _stored(found)


def _with_stored_positions(
    module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **named: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, _stored(query), _stored(key), *rest, **named)
