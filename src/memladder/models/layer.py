"""One Hugging Face decoder layer as a module of one tensor, filled from the weights' file.

Only the layer itself is ever put on the device: no embeddings, no second copy of the weights.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from memladder.core.case import Workload
from memladder.models import LayerConfig, cache_geometry, capture, tensor_shapes
from memladder.models.capture import Call, Decoder

# What the model around the layer has is not the layer's.
_AROUND = {"vocab_size": 64, "pad_token_id": None}


class Block(nn.Module):
    """hidden_states [batch_size, seq_len, hidden_size] to the same, causal.

    What the model around the layer would pass at every call (rotary cos and sin; ALiBi and the
    causal mask) is kept as buffers. `attention` is how transformers computes it. With a past,
    `cache` is transformers' own, and `kept` the layer's part of it, with room for past and new
    tokens.
    """

    def __init__(self, block: nn.Module, call: Call, attention: str, cache: Any = None):
        super().__init__()
        self.attention = attention
        self.block = block
        self.cache = cache
        self.kept: Any = None
        self._call = call
        self._buffer_of = {place: "passed_" + place.replace(".", "_") for place in call.tensors()}
        for place, tensor in call.tensors().items():
            self.pass_on(place, tensor)

    def passed(self, place: str) -> torch.Tensor:
        """What is passed there: `attention_mask`, `position_embeddings.0`."""
        return self.get_buffer(self._buffer_of[place])

    def pass_on(self, place: str, tensor: torch.Tensor) -> None:
        """Pass another tensor there from now on."""
        self.register_buffer(self._buffer_of[place], tensor, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tensors = {place: self.get_buffer(name) for place, name in self._buffer_of.items()}
        call = self._call.replaced(tensors, self.cache)
        return capture.call_block(self.block, hidden_states, call)


def decoder(config: LayerConfig, attention: str | None = None) -> Decoder:
    """The layer's model without weights. Raises ConfigError."""
    around = _AROUND if config.outline is None else {}
    return Decoder(config.model, {**config.values, **around}, attention)


def build(
    config: LayerConfig, workload: Workload, dtype: torch.dtype, attention: str | None = None
) -> Block:
    """The layer with parameters on the meta device, its other inputs on the CPU, and no cache yet.

    Raises ConfigError where transformers refuses the configuration.
    """
    whole = decoder(config, attention)
    block = whole.blocks[config.number]
    found = {name: tuple(tensor.shape) for name, tensor in block.named_parameters()}
    assert found == dict(tensor_shapes(config)), "the outline and transformers disagree"
    call = whole.calls(workload, dtype)[config.number]
    kept = {place: _once(place, tensor) for place, tensor in call.tensors().items()}
    held = whole.static_cache(workload.length) if workload.past else None
    return Block(block, call.replaced(kept), whole.attention, held)


def load(
    config: LayerConfig, weights: Path, workload: Workload, dtype: torch.dtype, device: torch.device
) -> Block:
    """The layer on `device`, each parameter moved there from the memory-mapped file in turn.

    On the CPU in the file's own dtype nothing is copied: the parameters are the mapped file.
    With a past, its cache is there and empty.
    """
    layer = build(config, workload, dtype)
    for name in tensor_shapes(config):
        # Opened for each tensor, so that a converted one's pages are gone before the next is read.
        with safe_open(weights, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(name).to(device=device, dtype=dtype)
        put(layer, name, tensor)
    gc.collect()
    layer.to(device)
    if layer.cache is not None:
        layer.kept = layer.cache.layers[config.number]
        allocate(layer.kept, config, workload, dtype, device)
    return layer


def allocate(
    kept: Any, config: LayerConfig, workload: Workload, dtype: torch.dtype, device: torch.device
) -> None:
    """Make room for past and new tokens in a static cache's layer."""
    geometry = cache_geometry(config)
    heads = (workload.batch_size, geometry.kv_heads, 0)
    kept.lazy_initialization(
        torch.empty(*heads, geometry.key_size, dtype=dtype, device=device),
        torch.empty(*heads, geometry.value_size, dtype=dtype, device=device),
    )
    for tensor in (kept.keys, kept.values, kept.cumulative_length):
        # What transformers marks as of one address would be compiled anew for each layer.
        if hasattr(tensor, "_dynamo_static_input_type"):
            del tensor._dynamo_static_input_type


def put(layer: Block, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter of that name."""
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(layer.block.get_submodule(module_name), leaf, parameter)


def _once(place: str, tensor: torch.Tensor) -> torch.Tensor:
    """A mask that is the same for each of the batch, once: it is added to all."""
    if place == "attention_mask" and tensor.dim() == 4 and (tensor == tensor[:1]).all():
        return tensor[:1].clone()
    return tensor
