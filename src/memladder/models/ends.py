"""What a model does before its first decoder layer and after its last.

Nothing of it is looked up by the model's name. transformers builds the model of a configuration
without layers and with a vocabulary of 97; what its modules take and give in one pass over random
weights says what each is, and the whole is then computed from that description and compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memladder.core.errors import ConfigError
from memladder.models import norms
from memladder.models.norms import Kind

_VOCABULARY = 97
_TOKENS = 7
_MOST = 1 << 24
# Of float32 sums over a row, in another order.
_CLOSE = 2e-5


@dataclass(frozen=True)
class Norm:
    """A norm over a whole row. `kind` rms or layer; `shift` is added to the stored weight (Gemma:
    1); weight and bias by their names in the model, None for ones and zeros."""

    kind: str
    eps: float
    weight: str | None
    bias: str | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Ends:
    """Embeddings and head.

    states = norm(factor · embedding[id] + positions[position + offset]);
    logits = cap(logit_factor · (head · norm(states) + bias)), cap(x) = softcap · tanh(x / softcap).

    Tensors by their names in the model; `head` is `embedding` where they are tied. A softcap of 0
    is none.
    """

    vocabulary: int
    hidden_size: int
    embedding: str
    factor: float
    positions: str | None
    offset: int
    embedding_norm: Norm | None
    final_norm: Norm | None
    head: str
    head_bias: str | None
    logit_factor: float
    softcap: float

    @property
    def is_tied(self) -> bool:
        """Whether the head's matrix is the embeddings'."""
        return self.head == self.embedding

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that is read of a checkpoint, each once."""
        own = [norm for norm in (self.embedding_norm, self.final_norm) if norm is not None]
        names = [self.embedding, self.positions, self.head, self.head_bias]
        names += [name for norm in own for name in (norm.weight, norm.bias)]
        return tuple(dict.fromkeys(name for name in names if name is not None))


def find(raw: Mapping[str, Any]) -> Ends:
    """The ends of the model that a `config.json` describes.

    Raises ConfigError for a model that transformers can't build, or that does something else there.
    """
    kind = raw.get("model_type")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(devices=[]):
                return _found(raw)
    except ConfigError as error:
        raise ConfigError(f"model type {str(kind)[:40]!r}: {error}") from None
    except Exception as error:  # transformers has many ways to fail on senseless numbers
        text = " ".join(str(error.args[0] if error.args else error).split())[:200]
        raise ConfigError(
            f"model type {str(kind)[:40]!r}: transformers can't build its embeddings and head: "
            f"{text}"
        ) from None


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it was, took (None for what is no tensor) and gave."""

    module: nn.Module
    given: Tensor | None
    found: Tensor


class _Nothing(nn.Module):
    """In place of a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        # Some models take the first of a tuple.
        self.gives_tuple = False
        # Some ask a layer for its kind of attention.
        self.attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.gives_tuple else hidden_states


def _found(raw: Mapping[str, Any]) -> Ends:
    size = raw.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MOST:
        raise ConfigError(f"vocab_size {str(size)[:40]!r} is not a whole number from 1 to {_MOST}")
    model, layer = _without_layers(raw)
    ids = (torch.arange(1, 1 + 2 * _TOKENS) * 11 % _VOCABULARY).view(2, -1)
    calls, logits = _recorded(model, layer, ids)
    cut = next(i for i, call in enumerate(calls) if call.module is layer)
    states = calls[cut].given
    assert states is not None
    ends = _described(model, raw, calls[:cut], calls[cut + 1 :], ids, logits)
    weights = dict(model.named_parameters())
    if not norms.agree(embedded(ends, weights.__getitem__, ids), states):
        raise ConfigError("its embeddings are changed in an unknown way")
    if not norms.agree(headed(ends, weights.__getitem__, states), logits):
        raise ConfigError("its logits are changed in an unknown way")
    return replace(ends, vocabulary=size)


def _without_layers(raw: Mapping[str, Any]) -> tuple[nn.Module, _Nothing]:
    """The model with random weights, and what stands in for its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {name: value for name, value in raw.items() if name not in _NOT_BUILT}
    config = AutoConfig.for_model(raw["model_type"], **given)
    config.num_hidden_layers, config.vocab_size = 0, _VOCABULARY
    config.pad_token_id, config.use_cache = None, False
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().eval()
    empty = [m for m in model.modules() if isinstance(m, nn.ModuleList) and not len(m)]
    if len(empty) != 1:
        raise ConfigError(f"it has {len(empty)} lists of layers; a decoder has one")
    layer = _Nothing()
    empty[0].append(layer)
    config.num_hidden_layers = 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values if parameter.dim() > 1 else 1 + 0.1 * values)
    return model, layer


def _recorded(model: nn.Module, layer: _Nothing, ids: Tensor) -> tuple[list[_Call], Tensor]:
    """Calls of what has parameters, of norms and of the layer, in one pass; its logits."""
    calls: list[_Call] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], found: Any) -> None:
        first = next(iter((*given, *named.values())), None)
        first = first if isinstance(first, Tensor) else None
        calls.append(_Call(module, first, found[0] if isinstance(found, tuple) else found))

    for module in model.modules():
        own = any(True for _ in module.parameters()) or "norm" in type(module).__name__.lower()
        if module is layer or (own and not any(module.children())):
            module.register_forward_hook(note, with_kwargs=True)
    wanted = (*ids.shape, _VOCABULARY)
    for layer.gives_tuple in (False, True):
        calls.clear()
        try:
            with torch.inference_mode():
                logits = model(ids).logits
        except (IndexError, RuntimeError, TypeError, ValueError):
            if layer.gives_tuple:
                raise
            continue
        if logits.shape == wanted and sum(call.module is layer for call in calls) == 1:
            return calls, logits
    raise ConfigError("its layers are not called one after the other")


def _described(
    model: Any,
    raw: Mapping[str, Any],
    before: list[_Call],
    after: list[_Call],
    ids: Tensor,
    logits: Tensor,
) -> Ends:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [call for call in before if isinstance(call.module, nn.Embedding)]
    others = [call for call in before if call not in tables]
    ending = [call for call in after if call.module is not head]
    if not tables or tables[0].module is not table or len(after) != len(ending) + 1:
        raise ConfigError("it has no embeddings and head of the common kind")
    for group, most in ((tables, 2), (others, 1), (ending, 1)):
        for call in group[most:]:
            raise ConfigError(f"it has a {type(call.module).__name__} outside its layers")
    entered = others[0].given if others else after[0].given
    assert entered is not None
    learned = tables[1] if tables[1:] else None
    if learned is not None:
        entered = entered - learned.found
    return Ends(
        vocabulary=_VOCABULARY,
        hidden_size=entered.shape[-1],
        embedding=names[id(table.weight)],
        factor=_ratio(entered, functional.embedding(ids, table.get_parameter("weight"))),
        positions=None if learned is None else names[id(learned.module.get_parameter("weight"))],
        offset=0 if learned is None else _offset(learned),
        embedding_norm=_norm(others[0], names) if others else None,
        final_norm=_norm(ending[0], names) if ending else None,
        head=names[id(head.weight)],
        head_bias=None if head.bias is None else names[id(head.bias)],
        **_cap(raw, after[-1].found, logits),
    )


def _ratio(found: Tensor, of: Tensor) -> float:
    """The number that `of` is multiplied by, nearest in squares."""
    ratio = float((found.double() * of.double()).sum() / of.double().square().sum())
    # One, but for roundings.
    return 1.0 if abs(ratio - 1) < _CLOSE else ratio


def _offset(call: _Call) -> int:
    """Which row of a table of positions stands for the first."""
    table: Tensor = call.module.get_parameter("weight")
    first = call.found.reshape(-1, table.shape[1])[0]
    return int((table - first).square().sum(dim=1).argmin())


def _norm(call: _Call, names: Mapping[int, str]) -> Norm:
    found = None if call.given is None else norms.known(call.module, call.given, call.found)
    if found is None:
        raise ConfigError(f"its {type(call.module).__name__} is no norm that is known")
    own = dict(call.module.named_parameters())
    weight, bias = (names[id(own[one])] if one in own else None for one in ("weight", "bias"))
    return Norm(found.kind, found.eps, weight, bias, found.shift)


def _cap(raw: Mapping[str, Any], found: Tensor, logits: Tensor) -> dict[str, float]:
    """What becomes of the head's product."""
    softcap = raw.get("final_logit_softcapping") or 0.0
    factor = _ratio(logits, found) if not softcap else 1.0
    return {"logit_factor": factor, "softcap": float(softcap)}


def embedded(ends: Ends, tensor: Callable[[str], Tensor], ids: Tensor) -> Tensor:
    """float32 [batch, sequence, hidden_size] for ids [batch, sequence], from position 0 on;
    `tensor` gives each by its name."""
    states = functional.embedding(ids, tensor(ends.embedding)).float() * ends.factor
    if ends.positions is not None:
        table = tensor(ends.positions)
        states = states + table[ends.offset : ends.offset + ids.shape[1]].float()
    return _named_norm(ends.embedding_norm, tensor, states)


def headed(ends: Ends, tensor: Callable[[str], Tensor], states: Tensor) -> Tensor:
    """float32 logits [batch, sequence, vocabulary] of what the last layer gave."""
    states = _named_norm(ends.final_norm, tensor, states)
    bias = None if ends.head_bias is None else tensor(ends.head_bias).float()
    logits = functional.linear(states, tensor(ends.head).float(), bias) * ends.logit_factor
    return logits if not ends.softcap else ends.softcap * torch.tanh(logits / ends.softcap)


def _named_norm(norm: Norm | None, tensor: Callable[[str], Tensor], states: Tensor) -> Tensor:
    if norm is None:
        return states
    weight, bias = (None if name is None else tensor(name) for name in (norm.weight, norm.bias))
    return norms.normed(states, Kind(norm.kind, norm.eps, norm.shift), weight, bias)


# Said of a whole model or of its weights; these build none of what is looked at here.
_NOT_BUILT = (
    *("model_type", "architectures", "auto_map", "quantization_config", "dtype", "torch_dtype"),
    *("transformers_version", "_name_or_path"),
)
