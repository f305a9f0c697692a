"""What a family's layers have that its `config.json` does not say: one row a family.

Whoever adds a family adds a row. Tests hold each one's parameter count against transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memladder.models.architecture.blocks import AttentionForm as Form


@dataclass(frozen=True)
class Family:
    """Differences from LLaMA's layer: two RMSNorms, separate projections, a gated MLP, rotary
    positions, a head of its own.

    `norms` counts norms of the hidden width a layer; `pattern` says which layers are full among
    windowed ones (every n-th, where the file does not say); `mixer` is what a layer that is no
    attention has. `router_bias` counts vectors of the number of experts beside the router, `gains`
    numbers that the activation learns.
    """

    form: Form = field(default_factory=Form)
    norms: int = 2
    norm_bias: bool = False
    final_norms: int = 1
    gated: bool = True
    mlp_bias: str | bool = "mlp_bias"
    mixer: str | None = None
    latent: bool = False
    window: str = "never"  # never | always | asked | pattern | chunked
    pattern: int = 0
    positions: int | None = None  # extra rows of a table of learned positions
    embedding_norm: bool = False
    head_bias: str | bool = False
    rotary: bool = True
    alibi: bool = False
    inner: str = "intermediate_size"
    inner_of_hidden: int = 0
    expert_inner: str | None = None
    expert_bias: bool = False
    router_bias: int = 0
    shared_gate: bool = False
    gains: int = 0


_QK = Form(qk_norm="head")
_NO_BIAS = Form(False, False)
_BIAS = Form(True, True)
_FUSED = Form(True, True, fused=True)
_QKV = Form(True, False)
_GPT = Family(_BIAS, norm_bias=True, gated=False, mlp_bias=True)

FAMILIES: dict[str, Family] = {
    # Dense, after LLaMA.
    "llama": Family(),
    "mistral": Family(_NO_BIAS, window="always"),
    "ministral3": Family(_NO_BIAS, window="always"),
    "ministral": Family(_NO_BIAS, window="pattern"),
    "qwen2": Family(_QKV, window="asked"),
    "qwen3": Family(_QK, window="asked"),
    "gemma": Family(),
    "gemma2": Family(norms=4, window="pattern", pattern=2),
    "gemma3_text": Family(_QK, norms=4, window="pattern", pattern=6),
    "phi3": Family(_NO_BIAS, window="always"),
    "olmo": Family(norms=0, final_norms=0),
    "olmo2": Family(Form(qk_norm="heads")),
    "olmo3": Family(Form(qk_norm="heads"), window="pattern", pattern=4),
    "smollm3": Family(),
    "granite": Family(),
    "cohere": Family(norms=1),
    "cohere2": Family(norms=1, window="pattern", pattern=4),
    "glm": Family(Form("attention_bias", False)),
    "glm4": Family(Form("attention_bias", False), norms=4),
    "exaone4": Family(Form(False, False, "head"), window="pattern", pattern=4),
    "seed_oss": Family(Form("attention_bias", "attention_out_bias")),
    "helium": Family(Form("attention_bias", False)),
    "arcee": Family(gated=False),
    "nemotron": Family(norm_bias=True, gated=False),
    "apertus": Family(_QK, gated=False, gains=2),
    "ernie4_5": Family(Form("use_bias", "use_bias"), mlp_bias="use_bias"),
    "hunyuan_v1_dense": Family(_QK),
    "internlm3": Family(Form("qkv_bias", "bias"), mlp_bias="bias"),
    "stablelm": Family(Form("use_qkv_bias", False), norm_bias=True),
    "starcoder2": Family(
        Form("use_bias", "use_bias"), norm_bias=True, gated=False, mlp_bias="use_bias",
        window="always",
    ),
    # After GPT: LayerNorm with bias, two matrices in the MLP.
    "bloom": replace(_GPT, embedding_norm=True, rotary=False, alibi=True, inner_of_hidden=4,
                     form=_FUSED),
    "falcon": replace(_GPT, form=Form("bias", "bias"), norms=1, mlp_bias="bias",
                      inner="ffn_hidden_size", inner_of_hidden=4),
    "gpt_neox": replace(_GPT, form=Form("attention_bias", "attention_bias")),
    "gpt2": replace(_GPT, positions=0, rotary=False, inner="n_inner", inner_of_hidden=4),
    "gptj": replace(_GPT, form=_NO_BIAS, norms=1, head_bias=True, inner="n_inner",
                    inner_of_hidden=4),
    "gpt_bigcode": replace(_GPT, positions=0, rotary=False, inner="n_inner", inner_of_hidden=4),
    "opt": replace(_GPT, form=Form("enable_bias", "enable_bias"), positions=2, rotary=False,
                   inner="ffn_dim", mlp_bias="enable_bias"),
    "mpt": Family(_NO_BIAS, gated=False, mlp_bias=False, rotary=False, alibi=True,
                  inner_of_hidden=4),
    "phi": replace(_GPT, norms=1, head_bias=True),
    # Experts.
    "mixtral": Family(_NO_BIAS, window="always"),
    "qwen2_moe": Family(Form("qkv_bias", False), expert_inner="moe_intermediate_size",
                        shared_gate=True, window="asked"),
    "qwen3_moe": Family(_QK, expert_inner="moe_intermediate_size"),
    "olmoe": Family(Form(qk_norm="heads")),
    "gpt_oss": Family(Form(sinks=True), window="pattern", pattern=2, expert_bias=True,
                      router_bias=1),
    "granitemoe": Family(),
    "phimoe": Family(Form("attention_bias", "attention_bias"), norm_bias=True,
                     head_bias="lm_head_bias", window="always"),
    "minimax_m2": Family(Form(False, False, "heads"), router_bias=1),
    "glm4_moe": Family(Form("attention_bias", False), expert_inner="moe_intermediate_size",
                       router_bias=1),
    "dots1": Family(_QK, expert_inner="moe_intermediate_size", router_bias=1, window="pattern"),
    "ernie4_5_moe": Family(Form("use_bias", "use_bias"), mlp_bias="use_bias",
                           expert_inner="moe_intermediate_size", router_bias=1),
    "hunyuan_v1_moe": Family(_QK),
    "llama4_text": Family(window="chunked", pattern=4, inner="intermediate_size_mlp",
                          expert_inner="intermediate_size"),
    "deepseek_v2": Family(latent=True, expert_inner="moe_intermediate_size"),
    "deepseek_v3": Family(latent=True, expert_inner="moe_intermediate_size", router_bias=1),
    "deepseek_v32": Family(latent=True, expert_inner="moe_intermediate_size", router_bias=1),
    "mistral4": Family(latent=True, expert_inner="moe_intermediate_size", router_bias=1),
    "glm_moe_dsa": Family(latent=True, expert_inner="moe_intermediate_size", router_bias=1),
    "glm4_moe_lite": Family(latent=True, expert_inner="moe_intermediate_size", router_bias=1),
    # Hybrids and recurrent ones.
    "qwen3_next": Family(Form(qk_norm="head", gated=True), mixer="delta", pattern=4,
                         expert_inner="moe_intermediate_size", shared_gate=True),
    "qwen3_5_text": Family(Form(qk_norm="head", gated=True), mixer="delta", pattern=4),
    "qwen3_5_moe_text": Family(Form(qk_norm="head", gated=True), mixer="delta", pattern=4,
                               expert_inner="moe_intermediate_size", shared_gate=True),
    "gemma4_text": Family(_QK, norms=4, window="pattern", pattern=6),
    "jamba": Family(_NO_BIAS, mixer="mamba1n", rotary=False),
    "mamba": Family(norms=1, mixer="mamba1", rotary=False),
    "falcon_mamba": Family(norms=1, mixer="mamba1", rotary=False),
    "mamba2": Family(norms=1, mixer="mamba2", rotary=False),
    "bamba": Family(mixer="mamba2"),
    "granitemoehybrid": Family(mixer="mamba2", rotary=False),
    "falcon_h1": Family(mixer="both"),
    "nemotron_h": Family(norms=1, mixer="mamba2", gated=False, rotary=False),
    "lfm2": Family(Form(False, False, "head"), mixer="conv"),
    "lfm2_moe": Family(Form(False, False, "head"), mixer="conv",
                       expert_inner="moe_intermediate_size", router_bias=1),
}  # fmt: skip

# Other spellings of the same layers.
_SAME = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified_text": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "llama4": "llama4_text",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "deepseek_v3",
    "mistral3": "mistral",
    "code_llama": "llama",
}


def family(name: str) -> Family | None:
    """The row of a family; None for one that is not known."""
    return FAMILIES.get(_SAME.get(name, name))


def canonical(name: str) -> str:
    """The family whose layers these are."""
    return _SAME.get(name, name)
