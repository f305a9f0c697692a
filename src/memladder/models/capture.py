"""Any causal language model that transformers builds from a configuration alone: no download, no
remote code. Its decoder layers' calls are recorded from a forward pass in which no layer computes.

Parameters are on the meta device or are one zero for all of a tensor, so that recording takes no
more memory than what the model passes to its layers: masks, positions, tables of angles.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Here, and not where it is used: that is traced, and torch 2.11 refuses lazy packages there.
from transformers.cache_utils import Cache

from memladder.core.case import MAX_LAYERS, Workload
from memladder.core.errors import ConfigError

# Elements; what a model computes from positions has fewer.
_LARGE = 1 << 20
DROPPED = ("quantization_config", "auto_map", "attn_implementation", "experts_implementation")
"""What would load code or kernels, or change how the model is built."""


@dataclass(frozen=True)
class Call:
    """What a model passes to one of its layers besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """By where they stand: `attention_mask`, `position_embeddings.0`."""
        found: dict[str, Tensor] = {}
        _walk("", {**{str(i): x for i, x in enumerate(self.args)}, **self.kwargs}, found)
        return found

    def replaced(self, tensors: Mapping[str, Tensor], cache: Any = None) -> Call:
        """The same call with other tensors, and `cache` where it passes one."""
        args = tuple(_put(str(i), x, tensors, cache) for i, x in enumerate(self.args))
        kwargs = {name: _put(name, x, tensors, cache) for name, x in self.kwargs.items()}
        return Call(args, kwargs)


def _walk(place: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[place] = value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    for name, item in items:
        _walk(f"{place}.{name}" if place else str(name), item, found)


def _put(place: str, value: Any, tensors: Mapping[str, Tensor], cache: Any) -> Any:
    if isinstance(value, Tensor):
        return tensors[place]
    if isinstance(value, Cache):
        return value if cache is None else cache
    if isinstance(value, Mapping):
        return {key: _put(f"{place}.{key}", x, tensors, cache) for key, x in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_put(f"{place}.{i}", x, tensors, cache) for i, x in enumerate(value))
    return value


class Decoder:
    """A causal language model around its decoder layers.

    `model` is transformers' own module, all parameters on the meta device and all buffers real;
    `blocks` are its decoder layers.
    """

    def __init__(
        self, family: str, values: Mapping[str, Any], attention: str | None = None
    ) -> None:
        """`attention` is how transformers computes it, None for its choice. Raises ConfigError
        where transformers can't build it."""
        with as_config_errors(family), _quiet(), _parameters_on_meta():
            self.config = text_config(family, values)
            _require_causal(self.config)
            _check_sizes(self.config)
            self.model = _built(self.config, attention)
        self.model.eval().requires_grad_(False)
        self.blocks_name, self.blocks = _blocks(self.model, self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of what the layers read and write."""
        size: int = self.config.hidden_size
        return size

    @property
    def embedding_size(self) -> int:
        """Width of an embedding, which a model may project before its layers."""
        size: int = self.model.get_input_embeddings().weight.shape[-1]
        return size

    @property
    def attention(self) -> str:
        """How transformers computes attention: `sdpa` or `eager`."""
        found: str = self.config._attn_implementation
        return found

    def around(self) -> dict[str, nn.Parameter]:
        """Parameters outside the layers, by the model's names; tied ones once."""
        inside = f"{self.blocks_name}."
        named = self.model.named_parameters()
        return {name: value for name, value in named if not name.startswith(inside)}

    def static_cache(self, tokens: int) -> Any:
        """transformers' cache of fixed size, none of its layers allocated."""
        from transformers import StaticCache

        return StaticCache(config=self.config, max_cache_len=tokens)

    def calls(
        self, workload: Workload, dtype: torch.dtype, device: str = "cpu", keep: bool = False
    ) -> list[Call]:
        """What each layer is passed when `workload.past` tokens a sequence are in its cache.

        With a past, or with `keep`, the model passes a cache; without, none.
        """
        past = None
        if workload.past or keep:
            past = self.static_cache(workload.past + workload.seq_len)
            for layer in past.layers:
                _pretend(layer, workload, dtype)
        one = torch.zeros((), dtype=dtype, device=device)
        states = one.expand(workload.batch_size, workload.seq_len, self.embedding_size)
        given = {"inputs_embeds": states, "use_cache": past is not None}
        if past is not None:
            given[cache_name(self.model)] = past
        with _outside_filled(self, dtype, device), torch.no_grad(), _quiet():
            return _recorded(self.model, self.blocks, given)


def text_config(family: str, values: Mapping[str, Any]) -> Any:
    """transformers' configuration of a decoder. Raises KeyError for a family that it lacks."""
    from transformers import AutoConfig

    kept = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in (*DROPPED, "model_type")
    }
    # `dtype` decides in what the model is built, which is ours to say.
    kept.pop("torch_dtype", None)
    kept.pop("dtype", None)
    # transformers standardises what it is given where it stands.
    kept = copy.deepcopy(kept)
    names = ("num_attention_heads", "head_dim", "hidden_size")
    heads, size, hidden = (kept.get(name) for name in names)
    if (
        isinstance(heads, int)
        and isinstance(size, int)
        and isinstance(hidden, int)
        and (hidden % max(heads, 1))
    ):
        # Some families refuse a width that heads do not divide, though theirs have a size given.
        config = AutoConfig.for_model(family, **{**kept, "hidden_size": heads * size})
        config.hidden_size = hidden
        return config
    return AutoConfig.for_model(family, **kept)


def import_family(family: str) -> None:
    """Load the code of a family's causal language model, and nothing else."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def call_block(block: nn.Module, states: Tensor, call: Call) -> Tensor:
    """One pass: [batch_size, seq_len, hidden_size] to the same; what comes beside it is dropped."""
    found = block(states, *call.args, **call.kwargs)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _built(config: Any, attention: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    # transformers' SDPA path leaves a soft cap of the scores out without a word.
    capped = getattr(config, "attn_logit_softcapping", None)
    attention = "eager" if capped is not None else attention
    chosen = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **chosen)


def _require_causal(config: Any) -> None:
    """Raise ConfigError for a vision tower, an encoder with a decoder, BERT's kind."""
    from transformers.models.auto import modeling_auto

    kind = type(config)
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"transformers has no causal language model of type {config.model_type}")
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    # transformers can run some encoders as decoders too.
    if masked and not getattr(config, "is_decoder", False):
        raise ConfigError(f"{config.model_type} is an encoder; a causal language model is wanted")


def _check_sizes(config: Any) -> None:
    count = config.num_hidden_layers
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LAYERS:
        raise ConfigError(
            f"number of layers {str(count)[:40]!r} is not a whole number from 1 to {MAX_LAYERS}"
        )


def _blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The model's outermost list of `count` modules."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError(f"no list of {count} decoder layers is found in {type(model).__name__}")


class _Stub(nn.Module):
    """Stands for a layer: notes how it is called, and computes nothing."""

    def __init__(self, block: nn.Module, calls: list[Call], shape: tuple[int, ...], form: int):
        super().__init__()
        # Not a submodule: only what the model's loop asks of the layer is looked up.
        self.__dict__["_block"] = block
        self._calls, self._shape, self._form = calls, shape, form

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(kwargs)
        states, rest = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
        if not isinstance(states, Tensor) or states.shape != self._shape:
            raise _OtherFormError
        self._calls.append(Call(rest, named))
        return states if self._form == 0 else (states, *[None] * (self._form - 1))


class _OtherFormError(Exception):
    """The layers give back their states in another form than was tried."""


def _recorded(model: Any, blocks: nn.ModuleList, given: dict[str, Any]) -> list[Call]:
    """Each layer's call. A layer gives back its states alone, or first in a tuple: both are tried,
    and the right one is that by which all layers see states of the same shape."""
    originals = list(blocks)
    shape = (*given["inputs_embeds"].shape[:2], model.config.hidden_size)
    reason: Exception | None = None
    for form in range(4):
        calls: list[Call] = []
        for number, block in enumerate(originals):
            blocks[number] = _Stub(block, calls, shape, form)
        try:
            model(**given)
        except (_OtherFormError, RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = error
            continue
        finally:
            for number, block in enumerate(originals):
                blocks[number] = block
        if len(calls) == len(originals):
            return calls
    text = " ".join(str(reason).split())[:200] if reason else "not every layer was called once"
    raise ConfigError(f"the layers of {type(model).__name__} can't be called apart: {text}")


def _pretend(layer: Any, workload: Workload, dtype: torch.dtype) -> None:
    """Let a cache's layer say that the past is in it, with one number a token."""
    if not hasattr(layer, "max_cache_len") or layer.is_initialized:
        return
    nothing = torch.zeros(workload.batch_size, 1, 0, 1, dtype=dtype)
    layer.lazy_initialization(nothing, nothing)
    set_length(layer, workload.past)


PLACES = frozenset(("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx"))
"""How layers name their own place in a model."""


def rename_place(block: nn.Module, number: int) -> None:
    """Let a layer take itself for the layer of that number."""
    for module in block.modules():
        for name in PLACES & vars(module).keys():
            setattr(module, name, number)


def set_length(layer: Any, tokens: int) -> None:
    """Let a static cache's layer hold so many tokens."""
    layer.cumulative_length.fill_(tokens)
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = tokens


def cache_name(model: Any) -> str:
    """transformers 5.24 gave the argument another name."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@contextmanager
def _outside_filled(decoder: Decoder, dtype: torch.dtype, device: str) -> Iterator[None]:
    """Give every parameter outside the layers real zeros: one number for all of a tensor."""
    one = torch.zeros((), dtype=dtype, device=device)
    kept = {}
    for name, parameter in decoder.around().items():
        module = decoder.model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        kept[name] = (module, leaf, parameter)
        module._parameters[leaf] = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, leaf, parameter in kept.values():
            module._parameters[leaf] = parameter


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors are made without values: a layer's experts alone can take 30 GB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and named.get("device") is None:
            size = named.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if math.prod(size) > _LARGE:
                named["device"] = "meta"
        return func(*args, **named)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made meanwhile have parameters without values, and real buffers.

    Built on the meta device, buffers such as rotary frequencies would be lost.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is there already is another module's, and stays the same object: it is tied.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def as_config_errors(family: str) -> Iterator[None]:
    """transformers has many ways to fail on senseless values; all of them are one line here."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"transformers can't build this {family}: {text}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers and torch warn about their own code."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
