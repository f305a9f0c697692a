"""A GGUF file of a Llama-type model as a Hugging Face checkpoint folder, in float16.

Any quantisation that the `gguf` package can undo is undone; the model is then what the file holds,
not what it was made of. Rotary positions turn neighbours in llama.cpp and halves in Hugging Face's
layer: rows of q and k trade places (as in `gguf_export`, the other way round).

The folder: `config.json`, `model-0000i-of-0000n.safetensors` with their index, and the tokenizer
with its chat template, as transformers reads them from the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memladder.core.errors import FormatError
from memladder.core.files import write_atomic
from memladder.models.gguf_export import LLAMA_NAMES

SHARD_BYTES = 1 << 30
"""Tensors go to one file up to this size; the host holds as much at a time."""

Progress = Callable[[int, int], None]

_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TOKENS = ("bos_token_id", "eos_token_id", "padding_token_id")


def convert(
    path: Path, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write the checkpoint folder `out`, which exists and is empty.

    Raises FormatError for a file that is no GGUF, that is none of a Llama-type model, or whose
    tensors are not those that its fields describe.
    """
    reader = _opened(path)
    config = _config(path, reader)
    tensors = _named(path, reader, config)
    shards = _shards(tensors, shard_bytes)
    places = {}
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / shard, config, {name: tensors[name] for name in names})
        places.update(dict.fromkeys(names, shard))
        if progress is not None:
            progress(number, len(shards))
    size = sum(2 * int(tensor.n_elements) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_atomic(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    _write_tokenizer(path, out)
    write_atomic(out / "config.json", json.dumps(config, indent=1) + "\n")


def _opened(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise FormatError(f"{path}: not a readable GGUF file: {reason}") from None


def _config(path: Path, reader: Any) -> dict[str, Any]:
    """What `config.json` says of the same model."""

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        if found is None and default is None:
            raise FormatError(f"{path}: field {name} is missing")
        return default if found is None else found.contents()

    architecture = str(field("general.architecture"))
    if architecture != "llama":
        raise FormatError(f"{path}: architecture {architecture[:40]!r}; llama can be converted")
    if reader.get_field("llama.rope.scaling.type") or reader.get_field("llama.expert_count"):
        raise FormatError(f"{path}: scaled rotary positions and experts can't be converted")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_act": "silu",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "rope_theta": float(field("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
    }
    for name, own in _FIELDS.items():
        config[name] = field(f"llama.{own}")
    heads = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = field("llama.attention.key_length", heads)
    for name in _TOKENS:
        found = reader.get_field(f"tokenizer.ggml.{name}")
        config[name.replace("padding", "pad")] = None if found is None else found.contents()
    return config


def _named(path: Path, reader: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The file's tensors by the names that Hugging Face's model has for them."""
    inner = {own: name for name, own in LLAMA_NAMES.items()}
    found = {}
    for tensor in reader.tensors:
        name = _OUTSIDE.get(tensor.name)
        if name is None and tensor.name.startswith("blk."):
            _, number, stem, leaf = tensor.name.split(".", 3)
            name = f"model.layers.{number}.{inner[stem]}.{leaf}" if stem in inner else None
        if name is None:
            raise FormatError(f"{path}: tensor {tensor.name[:80]!r} is none of a llama's")
        found[name] = tensor
    wanted = {_OUTSIDE["token_embd.weight"], _OUTSIDE["output_norm.weight"]} | {
        f"model.layers.{number}.{stem}.weight"
        for number in range(config["num_hidden_layers"])
        for stem in LLAMA_NAMES
    }
    for name in sorted(wanted - found.keys()):
        raise FormatError(f"{path}: tensor {name} is missing")
    return found


def _shards(tensors: Mapping[str, Any], most: int) -> list[list[str]]:
    """Names in their order, as many as fit into a file of `most` bytes, one at least."""
    found: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = 2 * int(tensor.n_elements)
        if found[-1] and size + nbytes > most:
            found.append([])
            size = 0
        found[-1].append(name)
        size += nbytes
    return found


def _write_shard(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(
        {name: _values(config, name, tensor) for name, tensor in tensors.items()},
        path,
        {"format": "pt"},
    )


def _values(config: Mapping[str, Any], name: str, tensor: Any) -> np.ndarray:
    from gguf import quants

    try:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise FormatError(f"{tensor.name} is {kind}, which gguf can't dequantise") from None
    # float16 wherever a value fits into it, which any Llama's do.
    stored = np.ascontiguousarray(values[_rows(config, name, len(values))].astype(np.float16))
    if not np.isfinite(stored).all():
        raise FormatError(f"{tensor.name}: a value beyond 65504 does not fit into fp16")
    return stored


def _rows(config: Mapping[str, Any], name: str, count: int) -> np.ndarray | slice:
    """Where each row of Hugging Face's matrix stands in the file's."""
    fields = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    field = next((fields[end] for end in fields if name.endswith(f".{end}")), None)
    if field is None:
        return slice(None)
    heads = config[field]
    return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _write_tokenizer(path: Path, out: Path) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(out)
