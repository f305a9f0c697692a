"""A layer as a GGUF file of one block, in the number format Q4_0, for llama.cpp.

Q4_0 (ggml): blocks of 32 neighbours along a row, four bits each and one fp16 scale, 4.5 bits a
weight. Names and order are those of llama.cpp's own converter: rotary positions turn neighbours
there and halves in Hugging Face's layer, so that rows of q and k trade places; BLOOM's fused q, k
and v stand one after the other. Vectors are float32, all that llama.cpp takes.

llama.cpp knows whole models only: a vocabulary of `VOCABULARY` entries and the norms around the
layers are in the file too, and are counted apart.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memladder.core.errors import ConfigError
from memladder.models import LayerConfig, cache, hidden_size, tensor_shapes, weights

VOCABULARY = 32
BLOCK = 32
BLOCK_BYTES = 18
VECTOR_ITEM_BYTES = 4
_RECIPE = "1"
# So many rows at once are quantised.
_ROWS = 1024

LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOOM = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_NAMES = {"llama": LLAMA_NAMES, "bloom": _BLOOM}
# Beside the layer: ones and zeros, [hidden_size] each.
_OTHERS = {
    "llama": ("output_norm.weight",),
    "bloom": (
        *("token_embd_norm.weight", "token_embd_norm.bias"),
        *("output_norm.weight", "output_norm.bias"),
    ),
}


def layer_bytes(config: LayerConfig) -> int:
    """Bytes of the layer's tensors in the file."""
    return sum(
        shape[0] * (VECTOR_ITEM_BYTES if len(shape) == 1 else shape[1] // BLOCK * BLOCK_BYTES)
        for shape in tensor_shapes(config).values()
    )


def other_bytes(config: LayerConfig) -> int:
    """Bytes of the tensors beside the layer: float16 embeddings, which are the head too; norms."""
    width = hidden_size(config)
    return width * (2 * VOCABULARY + VECTOR_ITEM_BYTES * len(_OTHERS[config.model]))


def check(config: LayerConfig) -> None:
    """Raises ConfigError for a layer that llama.cpp can't run in Q4_0."""
    values = config.values
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 2 and shape[1] % BLOCK:
            raise ConfigError(f"{name} has rows of {shape[1]}, no multiple of Q4_0's {BLOCK}")
    if config.model == "llama":
        kind, activation = values["rope_parameters"]["rope_type"], values["hidden_act"]
        if kind != "default" or activation != "silu":
            raise ConfigError(
                f"the GGUF of a llama layer is for silu and plain rotary positions, "
                f"not for {activation} and {kind}"
            )
    elif values["apply_residual_connection_post_layernorm"]:
        raise ConfigError("llama.cpp has no bloom with residuals after the norm")


def ensure(config: LayerConfig, cache_dir: Path, seed: int) -> Path:
    """The file, made if it is not there yet. Raises CacheError, ConfigError."""
    check(config)
    data = weights.ensure(config, cache_dir, seed)
    version = importlib.metadata.version("gguf")
    path = data.with_name(f"layer-q4_0-{_RECIPE}-gguf{version}.gguf")
    needed = layer_bytes(config) + other_bytes(config)
    return cache.made(path, lambda part: _write(config, data, seed, part), nbytes=needed)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name, shape, and type, and where its rows come from."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    rows: np.ndarray | None
    source: np.ndarray | None

    def parts(self) -> Iterator[np.ndarray]:
        """The values as they are stored, some rows at a time."""
        from gguf import quants

        if self.source is None:
            yield np.full(self.shape, 0 if self.name.endswith("bias") else 1, self._dtype())
        elif self.source.ndim == 1:
            source = self.source if self.rows is None else self.source[self.rows]
            yield source.astype(np.float32)
        else:
            for start in range(0, self.shape[0], _ROWS):
                chosen = (
                    slice(start, start + _ROWS)
                    if self.rows is None
                    else self.rows[start : start + _ROWS]
                )
                yield quants.quantize(self.source[chosen].astype(np.float32), self.kind)

    def nbytes(self) -> int:
        """Bytes in the file."""
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)

    def _dtype(self) -> Any:
        return np.float16 if self.name == "token_embd.weight" else np.float32


def _tensors(config: LayerConfig, data: Path, seed: int) -> list[_Tensor]:
    from gguf import GGMLQuantizationType as Kind

    width = hidden_size(config)
    found = [_Tensor("token_embd.weight", (VOCABULARY, width), Kind.F16, None, None)]
    found += [_Tensor(name, (width,), Kind.F32, None, None) for name in _OTHERS[config.model]]
    for name, entry in weights.entries(config, seed).items():
        module, _, leaf = name.rpartition(".")
        source = np.memmap(data, np.float16, "r", entry.offset, entry.shape)
        kind = Kind.F32 if source.ndim == 1 else Kind.Q4_0
        rows = _order(config, module)
        own = f"blk.0.{_NAMES[config.model][module]}.{leaf}"
        found.append(_Tensor(own, entry.shape, kind, rows, source))
    return found


def _order(config: LayerConfig, module: str) -> np.ndarray | None:
    """Which row of Hugging Face's matrix stands where in llama.cpp's; None where all do alike."""
    values = config.values
    if module == "self_attention.query_key_value":
        heads = values["n_head"]
        size = values["hidden_size"] // heads
        return np.arange(3 * heads * size).reshape(heads, 3, size).swapaxes(0, 1).reshape(-1)
    field = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    if module not in field:
        return None
    heads, size = values[field[module]], values["head_dim"]
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _write(config: LayerConfig, data: Path, seed: int, path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, config.model)
    _describe(writer, config)
    tensors = _tensors(config, data, seed)
    for tensor in tensors:
        dtype = np.dtype(np.float16 if tensor.kind.name == "F16" else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes(), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.concatenate(list(tensor.parts())))
    writer.close()


def _describe(writer: Any, config: LayerConfig) -> None:
    values = config.values
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_block_count(1)
    writer.add_embedding_length(values["hidden_size"])
    if config.model == "bloom":
        writer.add_context_length(_CONTEXT)
        writer.add_feed_forward_length(4 * values["hidden_size"])
        writer.add_head_count(values["n_head"])
        writer.add_head_count_kv(values["n_head"])
        writer.add_layer_norm_eps(values["layer_norm_epsilon"])
        return
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
    writer.add_rope_dimension_count(values["head_dim"])
    writer.add_rope_freq_base(values["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])


# ALiBi knows no end; llama.cpp wants one named.
_CONTEXT = 1 << 20
