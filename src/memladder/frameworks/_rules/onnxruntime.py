"""ONNX Runtime on CUDA: weights past the arena, the arena of the first run, and the block of the
memory pattern, which the second run takes beside it.

Counted in buffers of the layer's widths from six records of 1.30 on an H100; layers of other
families are counted alike, with a wider interval.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.frameworks._rules import caches, cpu
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError

VERSION = "1.30"
_CONTEXT = 520 * MIB
_MODULES = 146 * MIB
_PAGE = 2 * MIB


def predict(question: Question) -> Answer:
    """Raises UnpredictableError for experts and whole models."""
    model, layer = question.model, question.groups()[0].layer
    caches.require(question, caches.AS_ACTIVATIONS, "onnxruntime")
    if question.layers != 1 or question.ranks > 1:
        raise UnpredictableError("ONNX Runtime's row runs one layer on one GPU")
    if layer.experts or layer.kind not in ("full", "window"):
        raise UnpredictableError(f"no rules for ONNX Runtime on a layer of {model.family}")
    if question.device.is_cpu:
        return cpu.onnxruntime(question)
    rows, batch = 2 * question.tokens, question.batch_size
    hidden, inner = rows * model.hidden_size, rows * layer.inner
    keys = rows * layer.cache.kv_heads * layer.cache.key_size
    if model.alibi:
        scores = 2 * batch * layer.heads * question.seq_len * question.length
        pattern = max(2 * scores + 7 * hidden, 2 * inner + 3 * hidden)
        arena = max(2 * scores + 6 * hidden, 3 * inner + 5 * hidden)
        given = 2 * batch * layer.heads * question.length
        given += 2 * question.seq_len * question.length
    else:
        pattern = 3 * inner + 3 * hidden + 3 * keys
        arena = 3 * inner + 7 * hidden + 3 * keys // 2
        given = 4 * question.seq_len * layer.head_size
    weights = 2 * layer.parameters
    if not question.number("enable_mem_pattern", 1):
        pattern = 0
    cache = batch * caches.sequence_bytes(question, question.length) if question.past else 0
    sizes = (given, hidden, hidden + arena, pattern)
    slack = sum(-size % _PAGE for size in sizes if size > _PAGE)
    notes = () if model.family in ("llama", "bloom") else (f"not seen: {model.family}",)
    entries = (
        Entry("context", _CONTEXT, Known.ASSUMED),
        Entry("modules", _MODULES, Known.ASSUMED),
        Entry("weights", weights, Known.DERIVED),
        Entry("kv_cache", cache, Known.DERIVED),
        Entry("inputs_outputs", given + 2 * hidden, Known.DERIVED),
        Entry("activations", max(arena, pattern), Known.DERIVED),
        Entry("allocator_slack", min(arena, pattern) + slack, Known.DERIVED,
              "of arena and pattern's block, the smaller"),
    )  # fmt: skip
    spread = 0.03 if not notes else 0.1
    return Answer(entries, spread, 8 * MIB, notes, VERSION)
