"""One Hugging Face decoder layer as a module of one tensor, filled from the weights' file.

Only the layer itself is ever put on the device: no embeddings, no second copy of the weights.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from torch import nn

from memladder.core.case import Workload
from memladder.core.errors import ConfigError
from memladder.models import LayerConfig, definition, tensor_shapes


class Block(nn.Module):
    """hidden_states [batch_size, seq_len, hidden_size] to the same, causal, without a cache.

    What the model around the layer would pass at every call (rotary cos and sin; ALiBi and the
    causal mask) is kept as buffers.
    """

    def __init__(self, model: ModuleType, block: nn.Module, passed: dict[str, torch.Tensor]):
        super().__init__()
        self.block = block
        self._call = model.call
        self._passed = tuple(passed)
        for name, tensor in passed.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        passed = {name: self.get_buffer(name) for name in self._passed}
        out: torch.Tensor = self._call(self.block, hidden_states, passed)
        return out


def build(config: LayerConfig, shape: Workload, dtype: torch.dtype) -> Block:
    """The layer with parameters on the meta device and its other inputs on the CPU.

    Raises ConfigError where transformers refuses the configuration.
    """
    model = definition(config.model)
    try:
        with torch.device("meta"):
            block = model.block(config.values).to(dtype).eval()
        passed = model.inputs(config.values, shape, dtype)
    except (ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"transformers can't build this {config.model} layer: {text}") from None
    found = {name: tuple(tensor.shape) for name, tensor in block.named_parameters()}
    assert found == tensor_shapes(config), "tensor_shapes and transformers disagree"
    block.requires_grad_(False)
    return Block(model, block, passed)


def load(
    config: LayerConfig, weights: Path, shape: Workload, dtype: torch.dtype, device: torch.device
) -> Block:
    """The layer on `device`, each parameter moved there from the memory-mapped file in turn.

    On the CPU in the file's own dtype nothing is copied: the parameters are the mapped file.
    """
    layer = build(config, shape, dtype)
    for name in tensor_shapes(config):
        # Opened for each tensor, so that a converted one's pages are gone before the next is read.
        with safe_open(weights, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(name).to(device=device, dtype=dtype)
        put(layer, name, tensor)
    gc.collect()
    return layer.to(device)


def put(layer: Block, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter of that name."""
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(layer.block.get_submodule(module_name), leaf, parameter)
