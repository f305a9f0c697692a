"""The past of one layer: keys and values of earlier tokens, as the layer itself makes them.

They are what the layer in float32 writes into a cache for the hidden states of the past, rounded to
float16, of one sequence: all of a batch have the same past. Made once, beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memladder.core.case import Workload
from memladder.core.errors import UnavailableError
from memladder.models import LayerConfig, cache, cache_geometry, capture, layer, weights
from memladder.models.capture import Decoder

# Tokens at a time: a mask for all of a long past would be larger than the past.
_CHUNK = 512
_RECIPE = "1"


def ensure(config: LayerConfig, cache_dir: Path, tokens: int, seed: int) -> Path:
    """The file with `keys` and `values` [1, kv_heads, tokens, size], made if it is not there yet.

    Raises UnavailableError for a layer that keeps a state instead, CacheError where the folder
    can't be written.
    """
    require_keys(config)
    data = weights.ensure(config, cache_dir, seed)
    path = data.with_name(f"past-{tokens}-{_RECIPE}.safetensors")
    if path.exists():
        return path
    with cache.writing(path.parent):
        if not path.exists():
            with cache.replacing(path) as part:
                keys, values = _made(config, data, tokens, seed)
                save_file({"keys": keys.half(), "values": values.half()}, part)
    return path


def require_keys(config: LayerConfig) -> None:
    """Raise UnavailableError for a layer that has no keys and values to keep."""
    geometry = cache_geometry(config)
    if geometry.recurrent:
        raise UnavailableError("this layer keeps a state of fixed size, and no keys and values")
    if not geometry.kv_heads:
        raise UnavailableError("this layer keeps no keys and values of its own")


def fill(path: Path, kept: Any, tokens: int) -> None:
    """Put a file's keys and values into a static cache's allocated layer, for all of its batch."""
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in ("keys", "values"):
            # A window keeps the last tokens alone.
            held = getattr(kept, name)
            last = file.get_slice(name)[:, :, max(tokens - held.shape[2], 0) :]
            held[:, :, : last.shape[2]] = last.to(held.device, held.dtype)
    capture.set_length(kept, tokens)


class _NotedError(Exception):
    """The keys and values are known."""


def _made(config: LayerConfig, data: Path, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    whole = layer.decoder(config)
    block = whole.blocks[config.number]
    with safe_open(data, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(file.get_tensor(name), requires_grad=False)
            setattr(block.get_submodule(owner), leaf, parameter)
    states = torch.from_numpy(weights.past_states(config, tokens, seed)).float()
    found = []
    with _widened(block), torch.inference_mode():
        for start in range(0, tokens, _CHUNK):
            chunk = states[:, start : start + _CHUNK]
            found.append(_noted(whole, block, config.number, chunk, start))
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return keys, values


def _noted(
    whole: Decoder, block: nn.Module, number: int, states: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """What the layer writes into its cache for these tokens, the first at position `start`."""
    workload = Workload(1, states.shape[1], start)
    call = whole.calls(workload, torch.float32, keep=True)[number]
    written = whole.static_cache(workload.length)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
        seen.append((keys, values))
        raise _NotedError

    written.layers[number].update = note
    try:
        capture.call_block(block, states, call.replaced(call.tensors(), written))
    except _NotedError:
        return seen[0]
    raise UnavailableError("this layer writes no keys and values")


@contextmanager
def _widened(block: nn.Module) -> Iterator[None]:
    """Each module's parameters are float32 while it computes, and no longer."""
    hooks = []
    kept: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        kept[module] = dict(module._parameters)
        for name, parameter in kept[module].items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)

    def narrow(module: nn.Module, _: Any, __: Any) -> None:
        module._parameters.update(kept.pop(module))

    for module in block.modules():
        if module._parameters and not list(module.children()):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(narrow))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
