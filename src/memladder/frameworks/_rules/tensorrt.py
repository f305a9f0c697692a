"""TensorRT: activations as TensorRT-RTX 1.7 plans them, counted in the layer's widths.

From six plans for an A100: 8 MiB of scratch, and what is live around the MLP and attention.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import MIB
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError

VERSION = "1.7.1"
# What the rerun's log of an A100 shows before an engine is loaded.
_CONTEXT = 426 * MIB
_SCRATCH = 8 * MIB


def predict(question: Question) -> Answer:
    """The plan of one layer. Raises UnpredictableError for more."""
    model, layer = question.model, question.groups()[0].layer
    if question.layers != 1 or question.ranks > 1 or question.past:
        raise UnpredictableError("TensorRT's row plans one layer without a past")
    if layer.experts or layer.kind != "full" or layer.cache.latent:
        raise UnpredictableError(f"no rules for TensorRT on a layer of {model.family}")
    rows = 2 * question.tokens
    hidden, inner = rows * model.hidden_size, rows * layer.inner
    activations = inner + 3 * hidden if model.alibi else 3 * inner + hidden
    constants = 2 * question.seq_len**2 if model.alibi else 4 * question.seq_len * layer.head_size
    entries = (
        Entry("context", _CONTEXT, Known.ASSUMED, "an A100's"),
        Entry("weights", 2 * layer.parameters, Known.DERIVED),
        Entry("inputs_outputs", 2 * hidden + constants, Known.DERIVED),
        Entry("activations", activations + _SCRATCH, Known.DERIVED),
    )
    return Answer(
        entries, 0.03, 8 * MIB, ("a plan, not a process: kernels are not in it",), VERSION
    )
