"""What vLLM is told: a model, of one layer or more, and an engine of little memory around it.

Written against vLLM 0.22.1; nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memladder import models
from memladder.core.case import Workload
from memladder.core.errors import UnavailableError
from memladder.models import LayerConfig, ModelConfig, cache_geometry, tensor_shapes

# Embeddings are padded to a multiple of this many tokens: fewer would take no less memory.
VOCABULARY = 64
# Tokens of a KV cache block, vLLM's default.
_BLOCK_TOKENS = 16
# A long prompt is worked off in parts: activations for so many tokens, and not for all of them.
_CHUNK_TOKENS = 512
# FlashAttention 3, which vLLM chooses on Hopper, has no ALiBi, and FlashAttention 2 stops with
# "FA2 does not support scheduler_metadata"; the Triton kernel adds ALiBi itself.
_ALIBI_BACKEND = "TRITON_ATTN"
_GROUP_SIZES = (128, 64)
# Where vLLM also looks for the longest sequence, which it then allows no longer one than.
_LENGTHS = frozenset(
    ("n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length")
)


def layer_model(config: LayerConfig, weight: str, shape: Workload) -> dict[str, Any]:
    """A `config.json` of a model with this layer alone, for sequences of the shape and one more.

    With tied embeddings there is one table of `VOCABULARY` rows, and no head.
    """
    found = {
        **config.values,
        "model_type": config.model,
        "architectures": [models.class_name(config.model)],
        **_first(config.values, 1),
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    rope = found.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    return _completed(found, config.values.get("max_position_embeddings"), config, weight, shape)


def whole_model(model: ModelConfig, layers: int, weight: str, shape: Workload) -> dict[str, Any]:
    """A `config.json` of the model's first layers, with its own vocabulary and head."""
    found = {
        **model.values,
        "model_type": model.family,
        "architectures": [model.class_name],
        **_first(model.values, layers, model.layer_count),
        "tie_word_embeddings": model.tied,
    }
    return _completed(found, model.max_positions, model.usual, weight, shape)


def _first(values: Mapping[str, Any], layers: int, count: int | None = None) -> dict[str, Any]:
    """The fields that say how many layers there are, and what each of them is."""
    names = [name for name in ("n_layer", "n_layers", "num_layers") if name in values]
    lists = {
        name: value[:layers]
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    return {"num_hidden_layers": layers, **dict.fromkeys(names, layers), **lists}


def _completed(
    found: dict[str, Any],
    positions: int | None,
    config: LayerConfig,
    weight: str,
    shape: Workload,
) -> dict[str, Any]:
    length = _model_length(shape)
    if positions is not None:
        found["max_position_embeddings"] = max(positions, length)
    for name in _LENGTHS & found.keys():
        if isinstance(found[name], int):
            found[name] = max(found[name], length)
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


def engine_arguments(
    groups: Sequence[tuple[int, LayerConfig]], weight: str, shape: Workload
) -> dict[str, Any]:
    """What `vllm.LLM` is told: low memory, and a KV cache of this case's tokens and no more.

    `groups` says how many layers there are of each kind. A past is a prompt's beginning that the
    engine finds in its cache: `enable_prefix_caching`.

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
        "enable_prefix_caching": shape.past > 0,
        "async_scheduling": False,
        "enable_flashinfer_autotune": False,
        "block_size": _BLOCK_TOKENS,
        "kv_cache_memory_bytes": kv_blocks(shape) * _block_bytes(groups),
        "gpu_memory_utilization": 0.01,
        "max_model_len": _model_length(shape),
        "max_num_seqs": shape.batch_size,
        "max_num_batched_tokens": max(
            # A past is worked off in parts too.
            shape.batch_size,
            min(shape.batch_size * shape.length, _CHUNK_TOKENS),
        ),
        "enable_chunked_prefill": True,
    }
    if weight == "int4":
        found["quantization"] = "compressed-tensors"
    if any(models.has_alibi(config) for _, config in groups):
        found["attention_config"] = {"backend": _ALIBI_BACKEND}
    if any(cache_geometry(config).window is not None for _, config in groups):
        # All layers keep all tokens: one kind of block.
        found["disable_hybrid_kv_cache_manager"] = True
    return found


def kv_blocks(shape: Workload) -> int:
    """Blocks for all tokens of the case, and the one that vLLM keeps for padding.

    The engine also wants to be able to hold one sequence of `max_model_len`.
    """
    tokens = shape.batch_size * -(-shape.length // _BLOCK_TOKENS)
    return max(tokens + 1, -(-_model_length(shape) // _BLOCK_TOKENS))


def remembered(shape: Workload) -> int:
    """Tokens of a sequence that the engine finds in its cache: those of full blocks."""
    return shape.past // _BLOCK_TOKENS * _BLOCK_TOKENS


def prompts(shape: Workload, vocabulary: int) -> list[list[int]]:
    """A prompt for each sequence. With a past they begin differently, so that none finds
    another's past."""
    tokens = [number % vocabulary for number in range(shape.length)]
    if not shape.past:
        return [tokens for _ in range(shape.batch_size)]
    # Two digits to the base of the vocabulary: 64 rows tell 4096 sequences apart.
    return [
        [number % vocabulary, number // vocabulary % vocabulary, *tokens][: shape.length]
        for number in range(shape.batch_size)
    ]


def cache_bytes(groups: Sequence[tuple[int, LayerConfig]], shape: Workload) -> int:
    """Bytes of all blocks."""
    return kv_blocks(shape) * _block_bytes(groups)


def _block_bytes(groups: Sequence[tuple[int, LayerConfig]]) -> int:
    """Keys and values of a block's tokens in fp16, or the vector that stands for them."""
    width = 0
    for count, config in groups:
        kept = cache_geometry(config)
        heads = kept.kv_heads * (kept.key_size + kept.value_size)
        width += count * (heads if kept.latent is None else kept.latent)
    return 2 * _BLOCK_TOKENS * width


def _model_length(shape: Workload) -> int:
    """The prompt, past and new tokens, and the one token that is generated."""
    return shape.length + 1
