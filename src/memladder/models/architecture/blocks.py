"""The parts of decoder layers, as lists of tensors: attention, MLP, experts, recurrent mixers.

Sizes follow transformers' modules of these families; tests compare totals with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memladder.models.architecture import CacheSpec, Split, TensorSpec
from memladder.models.architecture.values import Values

Tensors = list[TensorSpec]


def linear(
    name: str, rows: int, columns: int, bias: bool = False, split: Split = Split.ROWS
) -> Tensors:
    """A linear layer: its matrix and, where it has one, its bias."""
    found = [TensorSpec(f"{name}.weight", (rows, columns), split, linear=True)]
    if bias:
        kept = Split.NONE if split is Split.COLUMNS else split
        found.append(TensorSpec(f"{name}.bias", (rows,), kept))
    return found


def vectors(names: Iterable[str], size: int, split: Split = Split.NONE) -> Tensors:
    """Vectors of one size: norms, gains."""
    return [TensorSpec(name, (size,), split) for name in names]


@dataclass(frozen=True)
class AttentionForm:
    """How a family spells attention; sizes come from the configuration."""

    qkv_bias: str | bool = "attention_bias"
    out_bias: str | bool = "attention_bias"
    qk_norm: str | None = None
    sinks: bool = False
    gated: bool = False
    fused: bool = False


def attention(v: Values, form: AttentionForm, kind: str) -> tuple[Tensors, CacheSpec]:
    """Queries, keys, values, output; `kind` full, window or chunked."""
    hidden, heads = v.size("hidden_size"), v.size("num_attention_heads")
    kv_heads = v.size("num_key_value_heads", default=heads)
    if v.family == "falcon":
        kv_heads = heads if not v.get("multi_query") else 1
        if v.get("new_decoder_architecture"):
            kv_heads = v.size("num_kv_heads", default=heads)
    size = v.size("head_dim", default=hidden // heads)
    shared_values = False
    if kind == "full" and v.get("global_head_dim"):
        size = v.size("global_head_dim")
        shared_values = bool(v.get("attention_k_eq_v"))
        if shared_values:
            kv_heads = v.size("num_global_key_value_heads", default=kv_heads)
    bias, out_bias = v.switch(form.qkv_bias), v.switch(form.out_bias)
    queries, keys = heads * size, kv_heads * size
    if form.fused and kv_heads == heads:
        found = linear("self_attn.qkv_proj", queries + 2 * keys, hidden, bias)
    else:
        found = linear("self_attn.q_proj", queries * (2 if form.gated else 1), hidden, bias)
        found += linear("self_attn.k_proj", keys, hidden, bias, Split.KV_HEADS)
        if not shared_values:
            found += linear("self_attn.v_proj", keys, hidden, bias, Split.KV_HEADS)
    found += linear("self_attn.o_proj", hidden, queries, out_bias, Split.COLUMNS)
    if form.qk_norm == "head":
        found += vectors(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), size)
    elif form.qk_norm == "heads":
        found += vectors(("self_attn.q_norm.weight",), queries, Split.ROWS)
        found += vectors(("self_attn.k_norm.weight",), keys, Split.KV_HEADS)
    if form.sinks:
        found += vectors(("self_attn.sinks",), heads, Split.ROWS)
    window = v.size("sliding_window") if kind == "window" else None
    if kind == "chunked":
        window = v.size("attention_chunk_size", default=8192)
    return found, CacheSpec(kv_heads, size, size, window=window)


def latent_attention(v: Values, norms: bool = True) -> tuple[Tensors, CacheSpec]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    hidden, heads = v.size("hidden_size"), v.size("num_attention_heads")
    rank, rope = v.size("kv_lora_rank"), v.size("qk_rope_head_dim")
    nope, value = v.size("qk_nope_head_dim"), v.size("v_head_dim")
    bias = v.switch("attention_bias")
    q_rank = v.get("q_lora_rank")
    name = "self_attn"
    if q_rank is None:
        found = linear(f"{name}.q_proj", heads * (nope + rope), hidden)
    else:
        q_rank = v.size("q_lora_rank")
        found = linear(f"{name}.q_a_proj", q_rank, hidden, bias, Split.NONE)
        found += vectors((f"{name}.q_a_layernorm.weight",), q_rank) if norms else []
        found += linear(f"{name}.q_b_proj", heads * (nope + rope), q_rank)
    found += linear(f"{name}.kv_a_proj_with_mqa", rank + rope, hidden, bias, Split.NONE)
    found += vectors((f"{name}.kv_a_layernorm.weight",), rank) if norms else []
    found += linear(f"{name}.kv_b_proj", heads * (nope + value), rank)
    found += linear(f"{name}.o_proj", hidden, heads * value, bias, Split.COLUMNS)
    indexer = 0
    if v.get("index_head_dim"):
        width, indexers = v.size("index_head_dim"), v.size("index_n_heads")
        found += linear(f"{name}.indexer.wq_b", indexers * width, q_rank, split=Split.NONE)
        found += linear(f"{name}.indexer.wk", width, hidden, split=Split.NONE)
        found += linear(f"{name}.indexer.weights_proj", indexers, hidden, split=Split.NONE)
        found += vectors(
            ("self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.bias"), width
        )
        indexer = width
    return found, CacheSpec(latent=rank + rope, indexer=indexer)


def mlp(
    hidden: int,
    inner: int,
    gated: bool = True,
    bias: bool = False,
    name: str = "mlp",
    count: int = 1,
) -> Tensors:
    """Gate, up, down; or two matrices where it is not gated."""
    names = ("gate_proj", "up_proj") if gated else ("up_proj",)
    found: Tensors = []
    for part in names:
        found += linear(f"{name}.{part}", inner, hidden, bias)
    found += linear(f"{name}.down_proj", hidden, inner, bias, Split.COLUMNS)
    if count == 1:
        return found
    return [TensorSpec(t.name, t.shape, t.split, t.linear, count) for t in found]


def delta_net(v: Values) -> tuple[Tensors, CacheSpec]:
    """Gated DeltaNet (arXiv:2412.06464), as Qwen3-Next and Qwen3.5 have it."""
    hidden = v.size("hidden_size")
    key_heads, value_heads = v.size("linear_num_key_heads"), v.size("linear_num_value_heads")
    key, value = v.size("linear_key_head_dim"), v.size("linear_value_head_dim")
    kernel = v.size("linear_conv_kernel_dim")
    keys, values = key_heads * key, value_heads * value
    channels = 2 * keys + values
    name = "linear_attn"
    found = linear(f"{name}.in_proj_qkvz", channels + values, hidden)
    found += linear(f"{name}.in_proj_ba", 2 * value_heads, hidden)
    found += [TensorSpec(f"{name}.conv1d.weight", (channels, kernel), Split.ROWS)]
    found += vectors((f"{name}.dt_bias", f"{name}.A_log"), value_heads, Split.ROWS)
    found += vectors((f"{name}.norm.weight",), value)
    found += linear(f"{name}.out_proj", hidden, values, split=Split.COLUMNS)
    return found, CacheSpec(state=value_heads * key * value, conv=(kernel - 1) * channels)


def mamba2(v: Values, hidden: int, name: str = "mamba") -> tuple[Tensors, CacheSpec]:
    """Mamba-2 (arXiv:2405.21060): inner width, groups of states, heads."""
    heads = v.size("mamba_n_heads", "mamba_num_heads", "num_heads", "n_mamba_heads")
    width = v.get("mamba_d_head", "mamba_head_dim", "head_dim", "mamba_headdim")
    expand = v.get("mamba_expand", "expand") or 2
    inner = v.get("mamba_d_ssm") or (
        heads * width if isinstance(width, int) else round(expand * hidden)
    )
    states = v.size("mamba_d_state", "ssm_state_size", "state_size")
    groups = v.size("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    kernel = v.size("mamba_d_conv", "conv_kernel", default=4)
    bias = v.switch("mamba_proj_bias") or v.switch("use_bias")
    channels = inner + 2 * groups * states
    found = linear(f"{name}.in_proj", inner + channels + heads, hidden, bias)
    found += [TensorSpec(f"{name}.conv1d.weight", (channels, kernel), Split.ROWS)]
    if v.get("mamba_conv_bias", "use_conv_bias") is not False:
        found += vectors((f"{name}.conv1d.bias",), channels, Split.ROWS)
    found += vectors((f"{name}.dt_bias", f"{name}.A_log", f"{name}.D"), heads, Split.ROWS)
    if v.get("mamba_rms_norm") is not False:
        found += vectors((f"{name}.norm.weight",), inner, Split.ROWS)
    found += linear(f"{name}.out_proj", hidden, inner, bias, Split.COLUMNS)
    return found, CacheSpec(state=inner * states, conv=(kernel - 1) * channels)


def mamba1(v: Values, norms: bool = False, name: str = "mamba") -> tuple[Tensors, CacheSpec]:
    """Mamba (arXiv:2312.00752); Jamba norms the three parts of the state's projection."""
    hidden = v.size("hidden_size")
    inner = v.get("intermediate_size") if v.get("state_size") else None
    inner = inner or round((v.get("mamba_expand", "expand") or 2) * hidden)
    states = v.size("mamba_d_state", "state_size", default=16)
    kernel = v.size("mamba_d_conv", "conv_kernel", default=4)
    rank = v.get("mamba_dt_rank", "time_step_rank")
    rank = rank if isinstance(rank, int) else -(-hidden // 16)
    bias = v.switch("mamba_proj_bias") or v.switch("use_bias")
    found = linear(f"{name}.in_proj", 2 * inner, hidden, bias)
    found += [TensorSpec(f"{name}.conv1d.weight", (inner, kernel), Split.ROWS)]
    if v.get("mamba_conv_bias", "use_conv_bias") is not False:
        found += vectors((f"{name}.conv1d.bias",), inner, Split.ROWS)
    found += linear(f"{name}.x_proj", rank + 2 * states, inner, split=Split.COLUMNS)
    found += linear(f"{name}.dt_proj", inner, rank, True)
    found += [TensorSpec(f"{name}.A_log", (inner, states), Split.ROWS)]
    found += vectors((f"{name}.D",), inner, Split.ROWS)
    found += linear(f"{name}.out_proj", hidden, inner, bias, Split.COLUMNS)
    if norms:
        found += vectors((f"{name}.dt_layernorm.weight",), rank)
        found += vectors((f"{name}.b_layernorm.weight", f"{name}.c_layernorm.weight"), states)
    return found, CacheSpec(state=inner * states, conv=(kernel - 1) * inner)


def short_convolution(v: Values) -> tuple[Tensors, CacheSpec]:
    """LFM2's gated convolution."""
    hidden, kernel = v.size("hidden_size"), v.size("conv_L_cache", default=3)
    bias = v.switch("conv_bias")
    found = linear("conv.in_proj", 3 * hidden, hidden, bias)
    found += [TensorSpec("conv.conv.weight", (hidden, kernel), Split.ROWS)]
    found += vectors(("conv.conv.bias",), hidden, Split.ROWS) if bias else []
    found += linear("conv.out_proj", hidden, hidden, bias, Split.COLUMNS)
    return found, CacheSpec(conv=(kernel - 1) * hidden)
