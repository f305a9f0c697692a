"""vLLM: its engine in this process, on a model of one layer and the least vocabulary it takes.

A variant's name reads activation, then weight: `vllm` alone is fp16, `vllm_fp16_int4` has int4
weights in groups with fp16 scales. Weights are dummies: no file is read, and nothing of the
layer's memory depends on their values. The engine keeps a layer's output to itself, so what it
holds is compared instead: weight bytes, layer count, shapes.
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

from memladder import models
from memladder.core.case import Case
from memladder.core.errors import UnavailableError
from memladder.core.files import own_folder, write_atomic
from memladder.frameworks._shared import vllm_engine
from memladder.frameworks._shared.base import (
    Availability,
    Framework,
    Job,
    Session,
    Setting,
    Structure,
    packed_bytes,
)
from memladder.frameworks._shared.torch_common import (
    TORCH_VARIABLES,
    AllocatorReadings,
    cuda_build,
    memory_errors,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from memladder.frameworks._rules.question import Answer, Question

_INSTALL = "memladder env create vllm"
# vLLM's fused matrices, and the model's that they are made of.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
    wholes = pasts = any_family = True
    variables = ("VLLM_*", "FLASHINFER_*", "FLASH_ATTN_*", "NCCL_*", *TORCH_VARIABLES)

    def __init__(self, title: str, weight: str) -> None:
        self.title = title
        self.weight = weight

    def availability(self, device: str) -> Availability:
        """One GPU, the first visible one: the engine takes no other in a single process."""
        if device == "cpu":
            install = f"a machine with an NVIDIA GPU; there: {_INSTALL}"
            return Availability(False, None, "vLLM's package runs on CUDA only", install)
        missing = [name for name in ("vllm", "torch") if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", _INSTALL)
        version = importlib.metadata.version("vllm")
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
        if job.model is None:
            found = vllm_engine.layer_model(job.config, self.weight, job.case.shape)
        else:
            found = vllm_engine.whole_model(job.model, job.layer_count, self.weight, job.case.shape)
        write_atomic(_folder(job, self.weight) / "config.json", json.dumps(found, indent=1) + "\n")

    def cache_bytes(self, job: Job) -> int:
        """Blocks for all tokens and one more, in fp16; a window's layers keep all tokens too."""
        return vllm_engine.cache_bytes(job.groups, job.case.shape)

    def refuses(self, job: Job) -> str | None:
        """A model's first layer can be had alone, and no other; and no layer's state."""
        if job.model is None and job.config.number:
            return f"vLLM runs a model's first layer alone, not layer {job.config.number}"
        if any(models.cache_geometry(config).recurrent for _, config in job.groups):
            return "a cache of states is not told to vLLM here"
        experts = any(
            len(shape) > 2
            for _, config in job.groups
            for shape in models.tensor_shapes(config).values()
        )
        if experts and self.weight != "fp16":
            return f"{self.title} has no experts here"
        return super().refuses(job)

    def weight_bytes(self, job: Job) -> int:
        """fp16, or 4 bits and an fp16 scale a group."""
        if self.weight == "fp16":
            return super().weight_bytes(job)
        size = vllm_engine.group_size(job.config)
        return sum(count * packed_bytes(config, 4, size, 16) for count, config in job.groups)

    def predict(self, question: Question) -> Answer:
        """By the engine's own rules; a checkpoint's scheme where the row's format is fp16."""
        from memladder.frameworks._rules import stored, vllm

        return vllm.predict(
            question, stored.SCHEMES[self.weight] if self.weight != "fp16" else None
        )

    def tolerance(self, device: str) -> float:
        """Nothing is compared: the output can't be read."""
        del device
        return 0.0

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import vLLM."""
        return _Session(job, announce, self)


def _folder(job: Job, weight: str) -> Path:
    length = job.case.shape.length
    name = f"{job.config.model}-{job.digest}-{weight}-{length}-{job.case.layers}"
    return job.cache_dir / "vllm" / name


class _Session(Session):
    def __init__(self, job: Job, announce: Callable[[str], None], variant: Vllm) -> None:
        super().__init__(job, announce)
        # What the engine keeps goes where all made files go, unless the user has said otherwise.
        for name, folder in (("VLLM_CACHE_ROOT", "vllm"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(own_folder(job.cache_dir / folder)))
        import torch
        import vllm
        from vllm.distributed import parallel_state

        self._torch, self._vllm = torch, vllm
        self._readings = AllocatorReadings()
        self._variant = variant
        self._passed = False
        self._vocabulary = vllm_engine.VOCABULARY
        if job.model is not None:
            self._vocabulary = job.model.vocab_size
        self._arguments = vllm_engine.engine_arguments(job.groups, variant.weight, job.case.shape)
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
        wanted = vllm_engine.kv_blocks(self.job.case.shape)
        if found != wanted:
            raise RuntimeError(f"the KV cache has {found} blocks where {wanted} were asked for")

    def compile(self) -> None:
        """Nothing is compiled; what only the dummy batch needed is let go of. A past is made."""
        gc.collect()
        self._torch.cuda.empty_cache()
        prompts = vllm_engine.prompts(self.job.case.shape, self._vocabulary)
        self._prompts = [{"prompt_token_ids": tokens} for tokens in prompts]
        self._sampling = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False
        )
        if self.job.case.shape.past:
            # Makes the past; what that took beside the cache is let go of.
            self.run()
            gc.collect()
            self._torch.cuda.empty_cache()

    def run(self) -> None:
        """All prompts through the engine, up to the token that follows each."""
        with memory_errors():
            outputs = self._llm.generate(self._prompts, self._sampling, use_tqdm=False)
            self._torch.cuda.synchronize()
        generated = [len(output.outputs[0].token_ids) for output in outputs]
        if generated != [1] * len(self._prompts):
            raise RuntimeError(f"the engine generated {generated} tokens where one each was asked")
        # The first pass over a past makes it; every other one finds it.
        wanted = vllm_engine.remembered(self.job.case.shape) if self._passed else 0
        found = {output.num_cached_tokens or 0 for output in outputs}
        if found != {wanted}:
            raise RuntimeError(f"the engine remembered {found} tokens of a past of {wanted}")
        self._passed = True

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
        chosen: dict[str, Setting] = {
            "weight_format": weight,
            "empty_cache_after_start": True,
            "vocabulary": self._vocabulary,
            "layers": self.job.layer_count,
            "weights": "dummies of vLLM's",
        }
        if self.job.case.shape.past:
            chosen["remembered_tokens"] = vllm_engine.remembered(self.job.case.shape)
        if weight == "int4":
            chosen["group_size"] = vllm_engine.group_size(self.job.config)
        variables = self._variant.environment(self.job.case)
        return {**told, **chosen, **_kernels(self._layers()[0]), **variables}

    def categories(self) -> Mapping[str, int]:
        """The layer's parameters, the model's others, the KV cache, the allocator's numbers."""
        weights = sum(one.nbytes for layer in self._layers() for one in layer.parameters())
        every = sum(one.nbytes for one in self._model().parameters())
        return {
            "weights": weights,
            "embeddings": every - weights,
            "buffers": sum(one.nbytes for one in self._model().buffers()),
            "kv_cache": self._arguments["kv_cache_memory_bytes"],
            **self._readings.categories(),
        }

    def begin_steady(self) -> None:
        """The allocator's peaks begin anew."""
        self._readings.begin_steady()

    def _model(self) -> nn.Module:
        model: nn.Module
        (model,) = self._llm.apply_model(lambda found: found)
        return model

    def _layers(self) -> list[nn.Module]:
        from torch import nn

        for module in self._model().modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.job.layer_count:
                return list(module)
        raise RuntimeError(f"no list of {self.job.layer_count} layers is found in vLLM's model")


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """A layer's parameters by the model's own names; vLLM's fused matrices are taken apart."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase

    found: dict[str, tuple[int, ...]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, LinearBase):
            found |= _linear(name, module)
        # Attention holds scalars for a quantised cache, which are not the layer's.
        elif not isinstance(module, Attention):
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


FRAMEWORK = Vllm("vLLM", "fp16")
VARIANTS = {"fp16_int4": Vllm("vLLM-W_INT4 A_FP16", "int4")}
