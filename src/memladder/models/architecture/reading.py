"""A `config.json` to an `Architecture`: the kind of each layer, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memladder.core.errors import ConfigError
from memladder.models.architecture import (
    Architecture,
    CacheSpec,
    LayerSpec,
    Split,
    TensorSpec,
    blocks,
    grouped,
)
from memladder.models.architecture.blocks import Tensors
from memladder.models.architecture.families import FAMILIES, Family, canonical, family
from memladder.models.architecture.towers import tower_parameters
from memladder.models.architecture.values import Values

_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "language_model")
_MAX_LAYERS = 4096
# What files call the kinds of mixers.
_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunked",
    "indexed_attention": "full",
    "linear_attention": "mixer",
    "mamba": "mixer",
    "conv": "mixer",
    "*": "full",
    "M": "mixer",
    "-": "mlp",
    "E": "moe",
    "mlp": "mlp",
    "moe": "moe",
    "hybrid": "both",
    "l": "window",
    "g": "full",
}


def read(raw: Mapping[str, Any]) -> Architecture:
    """The decoder that a `config.json` describes; the text part where it nests one.

    Raises ConfigError naming the field, or the family that is not known and what could be read.
    """
    text, outer = _text_part(raw)
    name = text.get("model_type")
    if not isinstance(name, str):
        raise ConfigError("no model_type: not a transformers config.json")
    row = family(name)
    if row is None:
        raise ConfigError(_unknown(name, text))
    values = Values({**text, "model_type": canonical(name)})
    hidden = values.size("hidden_size")
    kinds = _kinds(values, row)
    shared = values.count("num_kv_shared_layers")
    layers = []
    for index, kind in enumerate(kinds):
        follows = shared and index >= len(kinds) - shared
        layers.append(_layer(values, row, kind, index, bool(follows)))
    tied = bool(outer.get("tie_word_embeddings", values.get("tie_word_embeddings")))
    positions = 0 if row.alibi else values.count("max_position_embeddings", "n_positions")
    quantisation = raw.get("quantization_config") or text.get("quantization_config")
    if quantisation is not None and not isinstance(quantisation, Mapping):
        raise ConfigError(f"quantization_config {str(quantisation)[:40]!r} is not an object")
    return Architecture(
        family=name,
        hidden_size=hidden,
        vocabulary=values.size("vocab_size"),
        positions=positions,
        groups=grouped(layers),
        embeddings=tuple(_embeddings(values, row, hidden, len(kinds), tied)),
        tied=tied,
        dtype=_dtype(text, outer),
        rotary=_rotary(values, row, positions),
        towers=tower_parameters(raw, hidden) if text is not raw else 0,
        quantisation=quantisation,
        alibi=row.alibi,
    )


def _text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The decoder's own values, and the file around them."""
    for name in _TEXT:
        nested = raw.get(name)
        if isinstance(nested, Mapping):
            inner, _ = _text_part(nested)
            kind = inner.get("model_type") or _text_type(raw)
            return {**inner, "model_type": kind}, raw
    return raw, raw


def _text_type(raw: Mapping[str, Any]) -> str:
    outer = str(raw.get("model_type"))
    return f"{outer}_text" if f"{outer}_text" in FAMILIES else outer


def _unknown(name: str, text: Mapping[str, Any]) -> str:
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    read_values = [f"{key} {text[key]}" for key in wanted if isinstance(text.get(key), int)]
    found = f"; read: {', '.join(read_values)}" if read_values else ""
    return (
        f"no rules for the family {name[:40]!r}{found}; weights can be told from safetensors "
        "beside the config.json"
    )


def _dtype(text: Mapping[str, Any], outer: Mapping[str, Any]) -> str:
    for values in (text, outer):
        for key in ("dtype", "torch_dtype"):
            if isinstance(values.get(key), str):
                return str(values[key]).removeprefix("torch.")
    return "bfloat16"


def _kinds(v: Values, row: Family) -> list[str]:
    """The kind of each layer's mixer: full, window, chunked, mixer, both, mlp or moe."""
    given = v.said("layer_types", "layers_block_type", "hybrid_override_pattern")
    count = v.size("num_hidden_layers", default=len(given) if given else None)
    if count > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers {count} is above {_MAX_LAYERS}")
    if given is None and isinstance(v.said("sliding_window_pattern"), str):
        letters = v.said("sliding_window_pattern").lower()
        given = [letters[index % len(letters)] for index in range(count)]
    if given is not None:
        unknown = sorted({str(kind) for kind in given} - set(_KINDS))
        if unknown or len(given) != count:
            raise ConfigError(
                f"layer_types: {len(given)} layers where num_hidden_layers is {count}"
                if not unknown
                else f"layer_types: {', '.join(unknown)[:60]} not known"
            )
        kinds = [_KINDS[str(kind)] for kind in given]
        if row.mixer == "both":
            kinds = ["both"] * count
        return kinds
    return [_kind(v, row, index, count) for index in range(count)]


def _kind(v: Values, row: Family, index: int, count: int) -> str:
    if row.mixer:
        return _mixer_kind(v, row, index)
    every = row.pattern
    said = v.said("sliding_window_pattern", "full_attention_interval")
    if isinstance(said, int) and not isinstance(said, bool) and said > 0:
        every = said
    has_window = v.get("sliding_window") is not None
    if row.window == "chunked":
        return "full" if every and (index + 1) % every == 0 else "chunked"
    if row.window == "always" and has_window:
        return "window"
    if row.window == "pattern" and has_window and every:
        if v.family == "gemma4_text" and index == count - 1:
            return "full"
        if v.family in ("gemma2", "gpt_oss"):
            return "window" if index % every == 0 else "full"
        return "full" if (index + 1) % every == 0 else "window"
    if row.window == "asked" and has_window and v.get("use_sliding_window"):
        return "window" if index >= v.count("max_window_layers") else "full"
    return "full"


def _mixer_kind(v: Values, row: Family, index: int) -> str:
    if row.mixer == "both":
        return "both"
    if row.mixer == "delta":
        every = v.size("full_attention_interval", default=row.pattern)
        return "full" if (index + 1) % every == 0 else "mixer"
    indices = v.get("attn_layer_indices", "full_attn_idxs")
    if isinstance(indices, list):
        return "full" if index in indices else "mixer"
    if v.get("attn_layer_period"):
        period, offset = v.size("attn_layer_period"), v.count("attn_layer_offset")
        return "full" if index % period == offset else "mixer"
    return "mixer"


def _layer(v: Values, row: Family, kind: str, index: int, follows: bool) -> LayerSpec:
    hidden = v.size("hidden_size")
    tensors: Tensors = []
    cache = CacheSpec()
    if kind in ("full", "window", "chunked", "both"):
        parts, cache = (
            blocks.latent_attention(v) if row.latent else blocks.attention(v, row.form, kind)
        )
        tensors += _without_keys(parts) if follows else parts
    if kind in ("mixer", "both"):
        parts, state = _mixer(v, row, hidden)
        tensors += parts
        cache = CacheSpec(
            cache.kv_heads, cache.key_size, cache.value_size, state=state.state, conv=state.conv
        )
    if follows:
        cache = CacheSpec(cache.kv_heads, cache.key_size, cache.value_size, window=cache.window,
                          shared=True)  # fmt: skip
    inner = experts = chosen = expert_inner = 0
    if _has_mlp(v, kind):
        sparse = kind != "mlp" and _is_moe(v, index, kind)
        if sparse:
            parts, experts, chosen, expert_inner = _experts(v, row, hidden)
            tensors += parts
        if not sparse or v.family == "gemma4_text":
            parts, inner = _dense(v, row, hidden, follows)
            tensors += parts
    tensors += _norms(v, row, hidden)
    heads = v.size("num_attention_heads", default=1)
    return LayerSpec(
        kind, tuple(tensors), cache, heads, v.size("head_dim", default=max(hidden // heads, 1)),
        inner, experts, chosen, expert_inner, row.gated,
    )  # fmt: skip


def _without_keys(parts: Tensors) -> Tensors:
    """A layer that reads another's keys and values has queries and output only."""
    return [t for t in parts if not any(n in t.name for n in ("k_proj", "v_proj", "k_norm"))]


def _mixer(v: Values, row: Family, hidden: int) -> tuple[Tensors, CacheSpec]:
    if row.mixer == "delta":
        return blocks.delta_net(v)
    if row.mixer == "conv":
        return blocks.short_convolution(v)
    if row.mixer in ("mamba1", "mamba1n"):
        return blocks.mamba1(v, norms=row.mixer == "mamba1n")
    return blocks.mamba2(v, hidden)


def _has_mlp(v: Values, kind: str) -> bool:
    if v.family == "nemotron_h":
        return kind in ("mlp", "moe")
    return v.family not in ("mamba", "mamba2", "falcon_mamba")


def _is_moe(v: Values, index: int, kind: str) -> bool:
    if kind == "moe":
        return True
    if not v.count("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"):
        return False
    if v.family == "gemma4_text" and not v.get("enable_moe_block"):
        return False
    if index in (v.get("mlp_only_layers") or []):
        return False
    kinds = v.said("mlp_layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return str(kinds[index]) != "dense"
    if v.get("moe_layer_interval"):
        last = v.get("moe_layer_end_index")
        within = v.count("moe_layer_start_index") <= index
        within = within and not (isinstance(last, int) and 0 <= last < index)
        return within and (index + 1) % v.size("moe_layer_interval") == 0
    if index < v.count("first_k_dense_replace", "num_dense_layers"):
        return False
    if v.get("moe_layers") is not None and v.said("moe_layers"):
        return index in list(v.said("moe_layers"))
    for name in ("decoder_sparse_step", "interleave_moe_layer_step"):
        if v.get(name):
            return (index + 1) % v.size(name) == 0
    if v.get("expert_layer_period"):
        return index % v.size("expert_layer_period") == v.count("expert_layer_offset")
    frequency = v.get("moe_layer_freq")
    if isinstance(frequency, list):
        return bool(frequency[index]) if index < len(frequency) else True
    return not frequency or index % frequency == 0


def _dense(v: Values, row: Family, hidden: int, follows: bool) -> tuple[Tensors, int]:
    if row.inner_of_hidden:
        inner = v.size(row.inner, default=row.inner_of_hidden * hidden)
    elif v.family == "granitemoehybrid":
        inner = v.size("shared_intermediate_size")
    else:
        inner = v.size(row.inner)
    if follows and v.get("use_double_wide_mlp"):
        inner *= 2
    if v.get("block_auto_adjust_ff_dim"):
        multiple = v.size("block_multiple_of", default=256)
        inner = int(float(v.get("block_ffn_dim_multiplier") or 1) * (2 * inner // 3))
        inner = -(-inner // multiple) * multiple
    return blocks.mlp(hidden, inner, row.gated, v.switch(row.mlp_bias)), inner


def _experts(v: Values, row: Family, hidden: int) -> tuple[Tensors, int, int, int]:
    experts = v.size("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    chosen = v.size("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", default=1)
    inner = v.size(row.expert_inner or "intermediate_size")
    found = blocks.mlp(hidden, inner, row.gated, row.expert_bias, "mlp.experts", experts)
    found += [TensorSpec("mlp.gate.weight", (experts, hidden))]
    found += blocks.vectors(["mlp.gate.bias"] * row.router_bias, experts)
    shared = v.count("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    if not shared:
        shared = inner * v.count("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    if v.family == "llama4_text":
        shared = inner
    if v.family == "granitemoehybrid":
        shared = v.count("shared_intermediate_size")
    if shared:
        found += blocks.mlp(hidden, shared, row.gated, False, "mlp.shared_experts")
    if v.family == "gemma4_text":
        found += blocks.vectors(["router.scale"], hidden)
        found += blocks.vectors(["router.per_expert_scale"], experts)
    if row.shared_gate and shared:
        found += [TensorSpec("mlp.shared_expert_gate.weight", (1, hidden))]
    return found, experts, chosen, inner


def _norms(v: Values, row: Family, hidden: int) -> Tensors:
    count = row.norms
    if v.family == "falcon":
        two = v.count("num_ln_in_parallel_attn") or 2
        count = two if v.get("new_decoder_architecture") else 2 - bool(v.get("parallel_attn"))
    if v.family == "gemma4_text" and v.get("enable_moe_block"):
        count += 3
    found = blocks.vectors([f"norm_{n}.weight" for n in range(count)], hidden)
    if row.norm_bias:
        found += blocks.vectors([f"norm_{n}.bias" for n in range(count)], hidden)
    found += blocks.vectors(["mlp.act_fn"] * bool(row.gains), row.gains)
    per_layer = v.count("hidden_size_per_layer_input")
    if per_layer:
        found += blocks.linear("per_layer_input_gate", per_layer, hidden)
        found += blocks.linear("per_layer_projection", hidden, per_layer)
        found += blocks.vectors(["post_per_layer_input_norm.weight"], hidden)
    return found


def _embeddings(v: Values, row: Family, hidden: int, layers: int, tied: bool) -> Tensors:
    """Tables, final norm, head."""
    rows = v.size("vocab_size")
    width = v.size("word_embed_proj_dim", default=hidden)
    found = [TensorSpec("embed_tokens.weight", (rows, width), Split.VOCABULARY)]
    if width != hidden:
        found += blocks.linear("project_in", hidden, width)
        found += blocks.linear("project_out", width, hidden)
    if row.positions is not None:
        size = v.size("max_position_embeddings", "n_positions") + row.positions
        found.append(TensorSpec("embed_positions.weight", (size, hidden)))
    found += blocks.vectors(["norm.weight"] * row.final_norms, hidden)
    found += blocks.vectors(["norm.bias"] * (row.final_norms * row.norm_bias), hidden)
    if row.embedding_norm:
        found += blocks.vectors(["embed_norm.weight", "embed_norm.bias"], hidden)
    if not tied:
        found.append(TensorSpec("lm_head.weight", (rows, width), Split.VOCABULARY))
    if v.switch(row.head_bias):
        found.append(TensorSpec("lm_head.bias", (rows,), Split.VOCABULARY))
    per_layer = v.count("hidden_size_per_layer_input")
    if per_layer:
        size = v.size("vocab_size_per_layer_input")
        found.append(TensorSpec("embed_per_layer.weight", (size, layers * per_layer)))
        found += blocks.linear("per_layer_projection", layers * per_layer, hidden)
        found += blocks.vectors(["per_layer_norm.weight"], per_layer)
    return found


def _rotary(v: Values, row: Family, positions: int) -> tuple[tuple[int, int], ...]:
    """(positions, width) of the tables of cosines and sines that engines keep."""
    if not row.rotary or not positions:
        return ()
    heads = v.size("num_attention_heads", default=1)
    width = v.count("qk_rope_head_dim") or v.size(
        "head_dim", default=max(v.size("hidden_size") // heads, 1)
    )
    scaling = v.said("rope_scaling", "rope_parameters") or {}
    part = v.get("partial_rotary_factor", "rotary_pct")
    if part is None and isinstance(scaling, Mapping):
        part = scaling.get("partial_rotary_factor")
    if isinstance(part, int | float) and not v.count("qk_rope_head_dim"):
        width = round(width * part)
    return ((positions, width),)
