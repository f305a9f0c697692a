"""ladder and welder: the packed weights, the plan of the arena in closed form, and the driver.

Checked against the 42 records of an H100: to the 2 MiB of the driver's pages but for four cells of
8-bit activations, which load up to 6 MiB more of kernels.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.engine.program.cache import CACHE_FORMATS, CacheShape
from memladder.engine.program.steps import CHUNK
from memladder.frameworks._rules import caches, cpu, stored
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError

VERSION = "0.1"
# Without stacks (`driver.lean_context`), and all of the engine's kernels.
_CONTEXT = 254 * MIB
_MODULES = 4 * MIB
_PAGE = 2 * MIB
# Parts of sums, where few rows are multiplied on Hopper (`kernels/cuda/skinny.py`).
_WORKSPACE = 8 * MIB
_FEW_ROWS = range(2, 65)
_HOPPER = (9, 0)
_FP8 = (8, 9)
_NARROW = ("mxfp8", "int8")


def predict(question: Question, scheme: stored.Scheme, activation: str) -> Answer:
    """Weights in one block, the arena in another. Raises UnpredictableError."""
    if question.ranks > 1:
        raise UnpredictableError("ladder runs on one GPU")
    for group in question.groups():
        if group.layer.experts or group.layer.kind not in ("full", "window"):
            raise UnpredictableError("ladder compiles no experts and no recurrent layers yet")
        if group.layer.cache.latent:
            raise UnpredictableError("ladder compiles no latent attention yet")
    caches.require(question, CACHE_FORMATS, "ladder")
    if question.cache_format == "fp8":
        question.require_capability(_FP8, "ladder's cache in fp8")
    held = stored.stored(question, stored.everywhere(scheme), pad_vocabulary=False)
    arena = _arena(question, activation)
    hopper = (question.device.capability or _HOPPER) >= _HOPPER
    workspace = _WORKSPACE if hopper and question.tokens in _FEW_ROWS else 0
    weights = held.weights + held.scales
    notes, spread = [], 4 * MIB
    cache = around = 0
    if question.past:
        cache = _cache(question)
        notes.append("layers with a past were not measured yet")
        spread += 16 * MIB
    if question.whole:
        around = held.around
        logits = 4 * question.batch_size * question.model.vocabulary
        arena += logits
        notes.append("whole models were not measured yet")
        spread += 32 * MIB
    if question.device.is_cpu:
        return cpu.answer(question, "ladder", weights, arena, around, cache)
    blocks = [weights + around, arena + workspace, cache]
    slack = sum(-size % _PAGE for size in blocks)
    entries = (
        Entry("context", _CONTEXT, Known.ASSUMED, "without stacks"),
        Entry("modules", _MODULES, Known.ASSUMED),
        Entry("weights", held.weights, Known.DERIVED),
        Entry("scales", held.scales, Known.DERIVED),
        Entry("embeddings", around, Known.DERIVED),
        Entry("kv_cache", cache, Known.DERIVED),
        Entry("activations", arena, Known.DERIVED, "the arena, inputs and outputs in it"),
        Entry("workspace", workspace, Known.DERIVED),
        Entry("driver_step", slack, Known.DERIVED, "blocks end in pages of 2 MiB"),
    )
    return Answer(entries, 0.005, spread, tuple(notes), VERSION)


def _cache(question: Question) -> int:
    """The buffers that the engine plans for all layers in scope, as long as what is in them."""
    name = "fp16" if question.cache_format == "auto" else question.cache_format
    total = 0
    for group in question.groups():
        held = group.layer.cache
        if held.shared:
            continue
        shape = CacheShape(
            question.batch_size, question.length, question.seq_len, name, held.window
        )
        buffers = shape.state(held.kv_heads, held.key_size, held.window)
        total += group.count * sum(buffer.nbytes for buffer in buffers)
    return total


def _arena(question: Question, activation: str) -> int:
    """Hidden states of all tokens; with them keys and values of a sequence (of as many short ones
    as make a chunk) and a chunk's queries and output, or a chunk's norm and its MLP's inner
    activations. Where activations are quantised, a chunk's are there in 8 bits beside 16, and the
    norm is in place; attention's output is in 8 bits alone but for fp8."""
    rows, chunk = question.tokens, min(CHUNK, question.tokens)
    hidden, quantised = question.model.hidden_size, activation != "fp16"
    together = min(rows, max(question.seq_len, chunk))
    best = 0
    for group in question.groups():
        layer, cache = group.layer, group.layer.cache
        queries = layer.heads * layer.head_size
        keys = cache.kv_heads * (cache.key_size + cache.value_size)
        attended = chunk * queries * (1 if activation in _NARROW else 2)
        attention = 2 * together * keys + 2 * chunk * queries + attended
        mlp = chunk * (3 * layer.inner if quantised else 2 * layer.inner + 2 * hidden)
        best = max(best, attention, mlp)
    return 2 * rows * hidden + best
