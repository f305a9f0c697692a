"""A whole model in PyTorch: transformers' own, each kind of layer compiled once by Inductor.

What is around the layers (embeddings, masks, the final norm, the head) runs as transformers wrote
it. A layer's cache is told apart from the others', so that one compiled layer serves all of a kind.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memladder.frameworks._shared.base import Job, Setting
from memladder.frameworks._shared.torch_common import memory_errors
from memladder.frameworks.pytorch import InductorSession
from memladder.models import capture, whole
from memladder.models.whole import Source, Whole

if TYPE_CHECKING:
    pass


def source(job: Job) -> Source:
    """The model and how much of it a job runs."""
    assert job.model is not None
    return Source(job.model, job.layer_count, job.cache_dir, job.seed)


class CompiledLayer(nn.Module):
    """Stands in a model for one of its layers, and runs it compiled, with a cache of its own."""

    def __init__(self, block: nn.Module, compiled: Callable[..., Any], own_cache: Any) -> None:
        super().__init__()
        self.block = block
        self.__dict__["_compiled"] = compiled
        self.__dict__["_own_cache"] = own_cache

    def __getattr__(self, name: str) -> Any:
        # A model's loop may ask a layer what it is.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = capture.Call(args, kwargs)
        own = call.replaced(call.tensors(), self._own_cache)
        return self._compiled(*own.args, **own.kwargs)


class WholeSession(InductorSession):
    """Embeddings, layers, final norm, head: up to the logits."""

    def weights(self) -> None:
        """The model on the device, the past in its cache, and the new tokens."""
        job = self.job
        with memory_errors():
            self._whole = Whole(source(job), job.case.shape, self._dtype, self._device, self.filler)
            ids = whole.token_ids(source(job), job.case.shape)[:, job.case.shape.past :]
            self._ids = torch.from_numpy(ids).to(self._device)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._attention = self._whole.decoder.attention

    @property
    def filler(self) -> whole.Fill | None:
        """How a layer's weights get into its block, where that is not as they are."""
        return None

    def compile(self) -> None:
        """Compile a layer of each kind, inside the first pass."""
        from torch._dynamo.backends.registry import lookup_backend
        from torch._inductor.async_compile import shutdown_compile_workers

        inductor = lookup_backend("inductor")
        self._kinds = 0

        def backend(graph: Any, inputs: Any) -> Any:
            compiled = inductor(graph, inputs)
            gc.collect()
            self._kinds += 1
            if self._kinds == len(self.job.groups):
                self.announce("first run")
            return compiled

        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = self.job.layer_count + 8
        for number, block in enumerate(self._whole.blocks):
            first = self._whole.source.model.layer(number).number
            capture.rename_place(block, first)
            compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
            own = self._whole.own_cache(number)
            self._whole.blocks[number] = CompiledLayer(block, compiled, own)
        self.run()
        shutdown_compile_workers()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def passed(self) -> torch.Tensor:
        """The logits of one pass over the past."""
        self._whole.rewind()
        return self._whole(self._ids)

    def remember(self) -> None:
        """Put the past into all layers' caches."""
        self._whole.remember()

    def settings(self) -> Mapping[str, Setting]:
        """The layers', and what of the model's values is repeated."""
        return {
            **super().settings(),
            **whole.settings(self._whole.source, self.job.case.shape),
            "compiled_layers": self._kinds,
            "logits": "of the last token" if self._whole.makes_last else "of all new tokens",
        }

    def categories(self) -> Mapping[str, int]:
        """Parameters of the layers, and around them; the cache; the allocator's numbers."""
        found = {
            **self.held(),
            "embeddings": self._whole.around_bytes(),
            "buffers": sum(tensor.nbytes for tensor in self._whole.model.buffers()),
        }
        if self._whole.kept:
            found["kv_cache"] = sum(x.keys.nbytes + x.values.nbytes for x in self._whole.kept)
        return {**found, **self.allocated()}

    def held(self) -> Mapping[str, int]:
        """Bytes of the layers' parameters, as `weights`."""
        return {"weights": sum(one.nbytes for one in self._whole.block_parameters())}
