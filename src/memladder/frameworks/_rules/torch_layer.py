"""Layers of torch modules compiled by Inductor: the load, two passes, and what stays reserved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.frameworks._rules import caches, cpu, inductor, passes
from memladder.frameworks._rules.caching_allocator import CachingAllocator
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError
from memladder.models.architecture import LayerGroup, LayerSpec, TensorSpec

VERSION = "2.11"
# Kernels and libraries outside of the allocator; six records of an H100, without and with cuBLAS.
_KERNELS = 92 * MIB
_CUBLAS_KERNELS = 158 * MIB
_FLASH_KERNELS = 8 * MIB
# A fused attention kernel for long sequences; for few tokens another one runs.
_FLASH_TOKENS = 128
_CUBLAS = 32 * MIB
_CUBLASLT = MIB

Load = Callable[[CachingAllocator, TensorSpec], tuple[int, int]]
"""Put one matrix on the device: what is left of it, bytes of codes and of scales."""


@dataclass(frozen=True)
class Package:
    """How a package holds matrices and multiplies.

    `load` is None where a matrix stays as it is. `extra_kernels` are bytes of code of its own.
    `sum_over` is the buffer that the residual sum is written over (`inductor.steps`).
    `rounds_activations`: products take activations of a byte and a scale a row.
    """

    load: Load | None = None
    multiplies: inductor.Multiplies = inductor.by_cublas
    extra_kernels: int = 0
    sum_over: str = "o"
    rounds_activations: bool = False


def predict(question: Question, package: Package) -> Answer:
    """Context to slack on a GPU. Raises UnpredictableError for what the rules have not seen."""
    caches.require(question, caches.AS_ACTIVATIONS, "a torch layer")
    if question.device.is_cpu:
        if package.load is not None:
            raise UnpredictableError("no rules for quantised torch rows on a CPU")
        return cpu.torch_layer(question)
    if question.ranks > 1:
        raise UnpredictableError("torch's rows run on one GPU")
    notes = [] if question.layers == 1 and not question.past else ["seen for one layer only"]
    layer = question.model.widest()
    if _is_new(question, layer):
        notes.append(f"Inductor's code for {question.model.family} was not seen")
    replay = _Replay(question, package)
    replay.load()
    replay.passes()
    spread = 4 * MIB if not notes else 40 * MIB
    if package.load is not None:
        spread += 20 * MIB
    return Answer(
        tuple(replay.entries()), 0.01 if not notes else 0.05, spread, tuple(notes), VERSION
    )


def _is_new(question: Question, layer: LayerSpec) -> bool:
    kinds = ("llama", "mistral", "qwen2", "qwen3", "bloom")
    return question.model.family not in kinds or bool(layer.experts)


class _Replay:
    def __init__(self, question: Question, package: Package) -> None:
        self._question, self._package = question, package
        self._allocator = CachingAllocator()
        self._weights = self._scales = self._around = self._given = self._cache = 0
        self._workspace = 0
        self._usual = max(question.groups(), key=lambda group: group.count).layer

    def load(self) -> None:
        """Parameters in their order, buffers, hidden states."""
        question, take = self._question, self._allocator.malloc
        buffers = inductor.buffer_sizes(question)
        if self._package.load is not None:
            self._take_given(buffers)
        if question.whole:
            for tensor in question.model.embeddings:
                self._around += 2 * tensor.elements
                take(2 * tensor.elements)
        for group in question.groups():
            if question.layers == 1:
                for tensor in _ordered(group.layer):
                    self._tensor(tensor)
            else:
                self._lump(group)
        if self._package.load is not None:
            self._allocator.empty_cache()
        else:
            self._take_given(buffers)
        if question.past:
            self._take_cache()
        if not question.whole:
            self._take_given([2 * question.tokens * question.model.hidden_size])

    def _take_cache(self) -> None:
        """transformers' static cache: keys and values of each layer, or of all in one block."""
        question = self._question
        self._cache = question.batch_size * caches.sequence_bytes(question, question.length)
        parts = 2 if question.layers == 1 else 1
        for _ in range(parts):
            self._allocator.malloc(self._cache // parts)

    def _lump(self, group: LayerGroup) -> None:
        """Many layers: what stays of them, in one block; the load is not replayed."""
        weights = scales = 0
        for tensor in group.layer.tensors:
            if self._package.load is None or not tensor.linear or len(tensor.shape) != 2:
                weights += 2 * tensor.elements
                continue
            codes, more = _kept(self._package.load, tensor.shape)
            weights += tensor.count * codes
            scales += tensor.count * more
        self._weights += group.count * weights
        self._scales += group.count * scales
        self._allocator.malloc(group.count * (weights + scales))

    def _take_given(self, sizes: list[int]) -> None:
        for size in sizes:
            self._given += size
            self._allocator.malloc(size)

    def _tensor(self, tensor: TensorSpec) -> None:
        load = self._package.load
        if load is None or not tensor.linear or len(tensor.shape) != 2:
            self._weights += 2 * tensor.elements
            self._allocator.malloc(2 * tensor.elements)
            return
        codes, scales = load(self._allocator, replace(tensor, count=1))
        self._weights += tensor.count * codes
        self._scales += tensor.count * scales
        # Experts after the first leave what it leaves: they are not replayed.
        self._allocator.malloc((tensor.count - 1) * (codes + scales))

    def passes(self) -> None:
        """The first pass, in which libraries take their workspaces; then two more."""
        allocator = self._allocator
        running = passes.Passes(allocator, {"cublas": _CUBLAS, "cublaslt": _CUBLASLT})
        package = self._package
        steps = inductor.steps(self._question, self._usual, package.multiplies, package.sum_over)
        if package.rounds_activations:
            steps = inductor.rounded(steps)
        if self._question.whole:
            steps += inductor.head(self._question)
        output = running.run(steps)
        allocator.empty_cache()
        for _ in range(2):
            allocator.free(output)
            allocator.reset_peaks()
            output = running.run(steps)
        self._workspace = sum(running.taken.values())

    def entries(self) -> Iterator[Entry]:
        """The ledger's entries."""
        question, allocator = self._question, self._allocator
        output = inductor.output_bytes(question)
        yield Entry("context", question.device.context_bytes, Known.ASSUMED)
        yield Entry("modules", self._kernels(), Known.ASSUMED)
        yield Entry("weights", self._weights, Known.DERIVED)
        yield Entry("scales", self._scales, Known.DERIVED)
        yield Entry("embeddings", self._around, Known.DERIVED)
        yield Entry("kv_cache", self._cache, Known.DERIVED)
        yield Entry("inputs_outputs", self._given + output, Known.DERIVED)
        yield Entry("workspace", self._workspace, Known.DERIVED, "cuBLAS")
        live = (self._weights, self._scales, self._around, self._cache, self._given, output)
        held = sum(live) + self._workspace
        activations = max(allocator.peak_allocated - held, 0)
        yield Entry("activations", activations, Known.DERIVED)
        slack = allocator.peak_reserved - held - activations
        yield Entry("allocator_slack", slack, Known.DERIVED, "pages of 20 and 2 MiB, replayed")

    def _kernels(self) -> int:
        size = _CUBLAS_KERNELS if self._workspace else _KERNELS
        if self._question.seq_len >= _FLASH_TOKENS and not self._question.model.alibi:
            size += _FLASH_KERNELS
        return size + self._package.extra_kernels


@cache
def _kept(load: Load, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of codes and of scales of a matrix."""
    return load(CachingAllocator(), TensorSpec("", shape, linear=True))


def _ordered(layer: LayerSpec) -> list[TensorSpec]:
    """Norms first: they are small, and come before or after without a difference of a page."""
    norms = [tensor for tensor in layer.tensors if tensor.name.startswith("norm_")]
    return [*norms, *(tensor for tensor in layer.tensors if tensor not in norms)]


PLAIN = Package()
"""Matrices in 16 bits, multiplied by cuBLAS."""
