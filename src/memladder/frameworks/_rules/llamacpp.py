"""llama.cpp: the file's tensors, cells of the key-value cache, the compute buffer.

Source: llama.cpp src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp (cells), and its log lines
"KV self size", "compute buffer size". On CUDA the row was not measured.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.frameworks._rules import caches, stored
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError

VERSION = "0.3.36"
_PAD = 256
_UBATCH = 512
_MODULES = 128 * MIB
_CACHES = ("fp16", "bf16", "fp32", "q8_0", "q4_0")
_Q6_K = stored.Scheme(6.5625)


def predict(question: Question, scheme: stored.Scheme) -> Answer:
    """Q4_0 layers; of a whole the table in Q4_0 and the head in Q6_K, as its quantiser writes."""
    if question.ranks > 1:
        raise UnpredictableError("llama.cpp's row runs on one GPU")
    if question.device.is_cpu:
        raise UnpredictableError("no rules for llama.cpp's memory on a CPU")
    caches.require(question, _CACHES, "llama.cpp")
    held = stored.stored(question, stored.everywhere(scheme), item_bytes=4)
    around = _around(question, scheme) if question.whole else 0
    entries = (
        Entry("context", question.device.context_bytes, Known.ASSUMED),
        Entry("modules", _MODULES, Known.ASSUMED),
        Entry("weights", held.weights, Known.DERIVED),
        Entry("scales", held.scales, Known.DERIVED),
        Entry("embeddings", around, Known.DERIVED),
        Entry("kv_cache", cache_bytes(question), Known.DERIVED),
        Entry("activations", _compute(question), Known.DERIVED, "compute buffer"),
    )
    notes = ("llama.cpp on CUDA was not measured",)
    return Answer(entries, 0.1, 128 * MIB, notes, VERSION)


def _around(question: Question, scheme: stored.Scheme) -> int:
    """The table in the file's format; the head, or a tied table, in Q6_K; norms in float32."""
    total = 0
    for tensor in question.model.embeddings:
        if len(tensor.shape) == 1:
            total += 4 * tensor.elements
            continue
        last = tensor.name.startswith("lm_head") or question.model.tied
        total += sum((_Q6_K if last else scheme).matrix(*tensor.shape))
    return total


def cache_bytes(question: Question) -> int:
    """Cells in 256s for every sequence's tokens; of windows, with the part being worked off."""
    bits = caches.cache_bits(question.cache_format)
    cells = -(-question.batch_size * question.length // _PAD) * _PAD
    total = 0.0
    for group in question.groups():
        cache = group.layer.cache
        kept = cells
        if cache.window is not None:
            kept = min(cells, cache.window * question.batch_size + min(_UBATCH, question.tokens))
            kept = -(-kept // _PAD) * _PAD
        conv, state = cache.sequence_elements()
        total += group.count * kept * cache.token_elements() * bits / 8
        total += group.count * question.batch_size * 4 * (conv + state)
    return round(total)


def _compute(question: Question) -> int:
    """The larger of logits with hidden states, and of the MLP's activations, in float32."""
    rows = min(question.tokens, _UBATCH)
    layer = question.model.widest()
    hidden = 4 * rows * question.model.hidden_size
    inner = max(layer.inner, layer.experts_per_token * layer.expert_inner)
    mlp = 4 * rows * 2 * inner + 3 * hidden
    if not question.whole:
        return mlp
    return max(mlp, 4 * rows * question.model.vocabulary + 2 * hidden)
