"""vLLM: its engine in this process, on a model of one layer and the least vocabulary it takes.

A variant's name reads activation, then weight: `vllm` alone is fp16, `vllm_fp16_int4` has int4
weights in groups with fp16 scales. Weights are dummies: no file is read, and nothing of the
layer's memory depends on their values. The engine keeps a layer's output to itself, so what it
holds is compared instead: weight bytes, layer count, shapes.

Written against vLLM 0.22.1.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.case import FIGURE_SYSTEMS, Case, Shape
from memladder.errors import UnavailableError
from memladder.files import write_atomic
from memladder.frameworks.base import (
    Availability,
    Framework,
    Job,
    Session,
    Setting,
    Structure,
    packed_bytes,
)
from memladder.frameworks.torch_common import cuda_build, memory_errors
from memladder.models import LayerConfig, tensor_shapes

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

_INSTALL = "memladder env create vllm"
# Embeddings are padded to a multiple of this many tokens: fewer would take no less memory.
_VOCABULARY = 64
# Tokens of a KV cache block, vLLM's default.
_BLOCK_TOKENS = 16
# A long prompt is worked off in parts: activations for so many tokens, and not for all of them.
_CHUNK_TOKENS = 512
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "bloom": "BloomForCausalLM"}
# FlashAttention 3, which vLLM chooses on Hopper, has no ALiBi, and FlashAttention 2 stops with
# "FA2 does not support scheduler_metadata"; the Triton kernel adds ALiBi itself.
_ATTENTION = {"llama": None, "bloom": "TRITON_ATTN"}
# vLLM's fused matrices, and the model's that they are made of.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_GROUP_SIZES = (128, 64)


class Vllm(Framework):
    """vLLM's engine with weights in one format; activations in fp16."""

    packages = (
        "vllm",
        "torch",
        "triton",
        "transformers",
        "flashinfer-python",
        "compressed-tensors",
    )

    def __init__(self, key: str, weight: str) -> None:
        self.title = FIGURE_SYSTEMS[key]
        self.weight = weight

    def availability(self, device: str) -> Availability:
        """One GPU, the first visible one: the engine takes no other in a single process."""
        missing = [name for name in ("vllm", "torch") if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", _INSTALL)
        version = importlib.metadata.version("vllm")
        if device == "cpu":
            return Availability(False, version, "vLLM's package runs on CUDA only")
        if cuda_build() is None:
            return Availability(False, version, "torch is built without CUDA", _INSTALL)
        if device != "cuda:0":
            number = device.partition(":")[2]
            advice = f"set CUDA_VISIBLE_DEVICES={number} and use cuda:0"
            return Availability(False, version, "vLLM runs on the first visible GPU", advice)
        return Availability(True, version)

    def environment(self, case: Case) -> Mapping[str, str]:
        """The engine in the worker's own process, no network, no sampler that compiles kernels."""
        del case
        return {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "HF_HUB_OFFLINE": "1",
            "CUDA_MODULE_LOADING": "LAZY",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }

    def prepare(self, job: Job) -> None:
        """The folder with the `config.json` that the engine reads."""
        text = json.dumps(model_config(job.config, self.weight, job.case.shape), indent=1)
        write_atomic(_folder(job, self.weight) / "config.json", text + "\n")

    def weight_bytes(self, job: Job) -> int:
        """fp16, or 4 bits and an fp16 scale a group."""
        if self.weight == "fp16":
            return super().weight_bytes(job)
        return packed_bytes(job.config, 4, group_size(job.config), 16)

    def tolerance(self, device: str) -> float:
        """Nothing is compared: the output can't be read."""
        del device
        return 0.0

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import vLLM."""
        return _Session(job, announce, self)


def model_config(config: LayerConfig, weight: str, shape: Shape) -> dict[str, Any]:
    """A `config.json` of a model with this layer alone, for sequences of the shape and one more.

    With tied embeddings there is one table of `_VOCABULARY` rows, and no head.
    """
    values = dict(config.values)
    found = {
        **values,
        "architectures": [_ARCHITECTURES[config.model]],
        "num_hidden_layers" if config.model == "llama" else "n_layer": 1,
        "vocab_size": _VOCABULARY,
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


def engine_arguments(config: LayerConfig, weight: str, shape: Shape) -> dict[str, Any]:
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


def kv_blocks(shape: Shape) -> int:
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


def _model_length(shape: Shape) -> int:
    """The prompt and the one token that is generated."""
    return shape.seq_len + 1


def _folder(job: Job, weight: str) -> Path:
    name = f"{job.config.model}-{job.config.digest}-{weight}-{job.case.shape.seq_len}"
    return job.cache_dir / "vllm" / name


class _Session(Session):
    def __init__(self, job: Job, announce: Callable[[str], None], variant: Vllm) -> None:
        super().__init__(job, announce)
        # What the engine keeps goes where all made files go, unless the user has said otherwise.
        for name, folder in (("VLLM_CACHE_ROOT", "vllm"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(job.cache_dir / folder))
        import torch
        import vllm
        from vllm.distributed import parallel_state

        self._torch, self._vllm = torch, vllm
        self._variant = variant
        self._arguments = engine_arguments(job.config, variant.weight, job.case.shape)
        if torch.distributed.is_initialized():
            # `verify` runs one engine after the other.
            parallel_state.cleanup_dist_env_and_memory()

    def context(self) -> None:
        """Bring CUDA up on the device that the engine will use."""
        self._torch.cuda.set_device(self.job.case.device)
        self._torch.cuda.synchronize()

    def weights(self) -> None:
        """Start the engine. It makes the weights and the KV cache and runs a dummy batch, at once.

        Raises RuntimeError where the KV cache is of another size than was asked for.
        """
        with memory_errors():
            folder = _folder(self.job, self._variant.weight)
            self._llm = self._vllm.LLM(model=str(folder), **self._arguments)
        found = self._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        wanted = kv_blocks(self.job.case.shape)
        if found != wanted:
            raise RuntimeError(f"the KV cache has {found} blocks where {wanted} were asked for")

    def compile(self) -> None:
        """Nothing is compiled; what only the dummy batch needed is let go of."""
        gc.collect()
        self._torch.cuda.empty_cache()
        length = self.job.case.shape.seq_len
        tokens = [number % _VOCABULARY for number in range(length)]
        self._prompts = [{"prompt_token_ids": tokens}] * self.job.case.shape.batch_size
        self._sampling = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False
        )

    def run(self) -> None:
        """All prompts through the engine, up to the token that follows each."""
        with memory_errors():
            outputs = self._llm.generate(self._prompts, self._sampling, use_tqdm=False)
            self._torch.cuda.synchronize()
        generated = [len(output.outputs[0].token_ids) for output in outputs]
        if generated != [1] * len(self._prompts):
            raise RuntimeError(f"the engine generated {generated} tokens where one each was asked")

    def output(self) -> np.ndarray:
        """The engine tells tokens only."""
        raise UnavailableError("vLLM's engine keeps a layer's output to itself")

    def structure(self) -> Structure:
        """The decoder layers, as the engine's own modules describe them."""
        layers = self._layers()
        return Structure(len(layers), _shapes(layers[0]))

    def settings(self) -> Mapping[str, Setting]:
        """What the engine was told, and which kernels it chose for that."""
        told = {
            name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
            for name, value in self._arguments.items()
        }
        weight = self._variant.weight
        chosen: dict[str, Setting] = {"weight_format": weight, "vocabulary": _VOCABULARY}
        if weight == "int4":
            chosen["group_size"] = group_size(self.job.config)
        variables = self._variant.environment(self.job.case)
        return {**told, **chosen, **_kernels(self._layers()[0]), **variables}

    def categories(self) -> Mapping[str, int]:
        """The layer's parameters, the model's others, the KV cache, the allocator's numbers."""
        weights = sum(one.nbytes for layer in self._layers() for one in layer.parameters())
        every = sum(one.nbytes for one in self._model().parameters())
        stats = self._torch.cuda.memory_stats()
        found = {
            "weights": weights,
            "embeddings": every - weights,
            "buffers": sum(one.nbytes for one in self._model().buffers()),
            "kv_cache": self._arguments["kv_cache_memory_bytes"],
        }
        for name in ("allocated", "reserved"):
            found[f"allocator_{name}"] = stats[f"{name}_bytes.all.current"]
            found[f"allocator_{name}_peak"] = stats[f"{name}_bytes.all.peak"]
        return found

    def _model(self) -> nn.Module:
        model: nn.Module
        (model,) = self._llm.apply_model(lambda found: found)
        return model

    def _layers(self) -> list[nn.Module]:
        model: Any = self._model()
        llama = self.job.config.model == "llama"
        return list(model.model.layers if llama else model.transformer.h)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """A layer's parameters by the model's own names; vLLM's fused matrices are taken apart."""
    from vllm.model_executor.layers.linear import LinearBase

    found: dict[str, tuple[int, ...]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, LinearBase):
            found |= _linear(name, module)
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                found[f"{name}.{leaf}"] = tuple(parameter.shape)
    return found


def _linear(name: str, module: Any) -> dict[str, tuple[int, ...]]:
    """The matrices [out, in] and biases of one linear module, however they are stored."""
    prefix, _, leaf = name.rpartition(".")
    fused = leaf in _FUSED
    sizes = module.output_sizes if fused else (module.output_size,)
    found: dict[str, tuple[int, ...]] = {}
    for part, rows in zip(_FUSED[leaf] if fused else (leaf,), sizes, strict=True):
        found[f"{prefix}.{part}.weight"] = (rows, module.input_size)
        if getattr(module, "bias", None) is not None:
            found[f"{prefix}.{part}.bias"] = (rows,)
    return found


def _kernels(layer: nn.Module) -> dict[str, Setting]:
    """The kernels that the engine chose: for attention, and for quantised matrices."""
    from vllm.model_executor.layers.attention import Attention

    found: dict[str, Setting] = {}
    for module in layer.modules():
        if isinstance(module, Attention):
            found["attention_backend"] = module.attn_backend.get_name()
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            found["linear_kernel"] = type(kernel).__name__
    return found


FRAMEWORK = Vllm("vllm", "fp16")
VARIANTS = {"fp16_int4": Vllm("vllm_fp16_int4", "int4")}
