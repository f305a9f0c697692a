"""A process on a CPU: libraries, weights, what a pass writes, and the heap that is left.

PSS as memladder reads it. Constants are of 53 records of one machine (Python 3.11, torch 2.13,
ONNX Runtime 1.30): PSS of libraries moves by tens of MiB with what else maps them, so that small
cells are predicted within that and no better.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.frameworks._rules import caches, inductor
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError

# After the import; and what the first passes leave: late libraries, threads, heap.
_LIBRARIES = {"ladder": 218, "welder": 229, "pytorch": 325, "onnxruntime": 46}
_HEAP = {"ladder": 28, "welder": 42, "pytorch": 96, "onnxruntime": 32}
_LONG_HEAP = 20 * MIB
_LONG = 512
_SPREAD = 40 * MIB


def answer(
    question: Question, engine: str, weights: int, activations: int, around: int, cache: int
) -> Answer:
    """The ledger of these amounts, with the engine's constants."""
    heap = _HEAP[engine] * MIB + (_LONG_HEAP if question.tokens > _LONG else 0)
    entries = (
        Entry("libraries", _LIBRARIES[engine] * MIB, Known.ASSUMED, "interpreter and imports"),
        Entry("weights", weights, Known.DERIVED),
        Entry("embeddings", around, Known.DERIVED),
        Entry("kv_cache", cache, Known.DERIVED),
        Entry("activations", activations, Known.DERIVED),
        Entry("heap", heap, Known.ASSUMED, "late libraries, threads"),
    )
    notes = ("on a CPU: PSS of one kind of machine",)
    return Answer(entries, 0.05, _SPREAD, notes)


def _cache(question: Question) -> int:
    """Of frameworks whose cache is as its tokens are."""
    if not question.past:
        return 0
    return question.batch_size * caches.sequence_bytes(question, question.length)


def torch_layer(question: Question) -> Answer:
    """Weights, and the highest of Inductor's buffers; on a CPU softmax writes float32."""
    if question.layers != 1:
        raise UnpredictableError("no rules for whole models in torch on a CPU")
    layer = question.groups()[0].layer
    rows = 2 * question.tokens
    hidden = rows * question.model.hidden_size
    given = sum(inductor.buffer_sizes(question)) + hidden
    if question.model.alibi:
        scores = 2 * question.batch_size * layer.heads * question.seq_len * question.length
        highest = max(4 * scores + 3 * hidden, rows * layer.inner + 3 * hidden)
    else:
        inner = max(layer.inner, layer.experts_per_token * layer.expert_inner)
        highest = 2 * rows * inner + 3 * hidden
    return answer(question, "pytorch", 2 * layer.parameters, given + highest, 0, _cache(question))


def onnxruntime(question: Question) -> Answer:
    """Matrices widened to float32; scores in float16, and the MLP's widths."""
    model, layer = question.model, question.groups()[0].layer
    norms = sum(t.elements for t in layer.tensors if t.name.startswith("norm_"))
    weights = 4 * layer.parameters - 2 * norms
    rows = 2 * question.tokens
    hidden, inner = rows * model.hidden_size, rows * layer.inner
    scores = 2 * question.batch_size * layer.heads * question.seq_len * question.length
    if model.alibi:
        highest = 4 * scores + 7 * hidden + 2 * inner
    else:
        highest = scores + 3 * inner + 3 * hidden
    return answer(question, "onnxruntime", weights, highest + 2 * hidden, 0, _cache(question))
