"""What vLLM is told: a model of one layer, and an engine of little memory around it.

Written against vLLM 0.22.1; nothing of it is imported here.
"""

from __future__ import annotations

from typing import Any

from memladder.core.case import Workload
from memladder.core.errors import UnavailableError
from memladder.models import LayerConfig, tensor_shapes

# Embeddings are padded to a multiple of this many tokens: fewer would take no less memory.
VOCABULARY = 64
# Tokens of a KV cache block, vLLM's default.
_BLOCK_TOKENS = 16
# A long prompt is worked off in parts: activations for so many tokens, and not for all of them.
_CHUNK_TOKENS = 512
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "bloom": "BloomForCausalLM"}
# FlashAttention 3, which vLLM chooses on Hopper, has no ALiBi, and FlashAttention 2 stops with
# "FA2 does not support scheduler_metadata"; the Triton kernel adds ALiBi itself.
_ATTENTION = {"llama": None, "bloom": "TRITON_ATTN"}
_GROUP_SIZES = (128, 64)


def model_config(config: LayerConfig, weight: str, shape: Workload) -> dict[str, Any]:
    """A `config.json` of a model with this layer alone, for sequences of the shape and one more.

    With tied embeddings there is one table of `VOCABULARY` rows, and no head.
    """
    values = dict(config.values)
    found = {
        **values,
        "architectures": [_ARCHITECTURES[config.model]],
        "num_hidden_layers" if config.model == "llama" else "n_layer": 1,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    if config.model == "llama":
        positions = max(values["max_position_embeddings"], _model_length(shape))
        found["max_position_embeddings"] = positions
        found["rope_theta"] = values["rope_parameters"]["rope_theta"]
    if weight == "int4":
        found["quantization_config"] = _int4(group_size(config))
    return found


def group_size(config: LayerConfig) -> int:
    """128 neighbours share a scale where that divides all rows, else 64.

    Raises UnavailableError where neither does.
    """
    columns = {shape[1] for shape in tensor_shapes(config).values() if len(shape) == 2}
    for size in _GROUP_SIZES:
        if all(count % size == 0 for count in columns):
            return size
    raise UnavailableError(
        f"vLLM's int4 kernels need rows that are multiples of {_GROUP_SIZES[-1]}, "
        f"not of {min(count for count in columns if count % _GROUP_SIZES[-1])} elements"
    )


def _int4(size: int) -> dict[str, Any]:
    """Weights of all linear modules in symmetric int4, in the form of compressed-tensors.

    As `gptq`, the same would silently stay fp16: there vLLM reads from the checkpoint's tensors
    which modules are quantised, and dummies have no checkpoint.
    """
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def engine_arguments(config: LayerConfig, weight: str, shape: Workload) -> dict[str, Any]:
    """What `vllm.LLM` is told: low memory, and a KV cache of this case's tokens and no more.

    With `kv_cache_memory_bytes` the engine sizes nothing by `gpu_memory_utilization`, and still
    asks at its start that this share of the device is free: 1 % is the least that makes sense.
    """
    found: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "float16",
        "model_impl": "vllm",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "enable_flashinfer_autotune": False,
        "block_size": _BLOCK_TOKENS,
        "kv_cache_memory_bytes": kv_blocks(shape) * _block_bytes(config),
        "gpu_memory_utilization": 0.01,
        "max_model_len": _model_length(shape),
        "max_num_seqs": shape.batch_size,
        "max_num_batched_tokens": max(shape.batch_size, min(shape.tokens, _CHUNK_TOKENS)),
        "enable_chunked_prefill": True,
    }
    if weight == "int4":
        found["quantization"] = "compressed-tensors"
    if _ATTENTION[config.model] is not None:
        found["attention_config"] = {"backend": _ATTENTION[config.model]}
    return found


def kv_blocks(shape: Workload) -> int:
    """Blocks for all tokens of the case, and the one that vLLM keeps for padding.

    The engine also wants to be able to hold one sequence of `max_model_len`.
    """
    tokens = shape.batch_size * -(-shape.seq_len // _BLOCK_TOKENS)
    return max(tokens + 1, -(-_model_length(shape) // _BLOCK_TOKENS))


def _block_bytes(config: LayerConfig) -> int:
    """Keys and values of a block's tokens in fp16."""
    values = config.values
    width: int = values["hidden_size"]
    if config.model == "llama":
        width = values["num_key_value_heads"] * values["head_dim"]
    return 2 * _BLOCK_TOKENS * width * 2


def _model_length(shape: Workload) -> int:
    """The prompt and the one token that is generated."""
    return shape.seq_len + 1
