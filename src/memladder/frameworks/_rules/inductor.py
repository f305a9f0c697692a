"""A decoder layer as Inductor compiles it for a GPU: its kernels and buffers, in their order.

The orders were read from the code that torch 2.13's Inductor writes for Hugging Face's layers
(concatenations fused as on a GPU); replayed, they give the allocated, peak and reserved bytes of
memladder's six PyTorch records of an H100 (torch 2.11) to the byte and the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from memladder.frameworks._rules.passes import Step
from memladder.frameworks._rules.question import Question
from memladder.models.architecture import LayerSpec, TensorSpec

_FLOAT = 4
# The steps that multiply, by the matrix's name in the layer.
_PRODUCTS: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "qkv": "self_attn.qkv_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Product:
    """How a matrix is multiplied: what it takes meanwhile, and whose handle it asks for.

    `planned`: Inductor makes the output (cuBLAS writes into it); else the operator does.
    """

    libraries: tuple[str, ...] = ("cublas",)
    before: tuple[int, ...] = ()
    planned: bool = True


Multiplies = Callable[[TensorSpec, bool, int], Product]
"""By matrix, whether a bias is added, and rows of the activation."""


def by_cublas(matrix: TensorSpec, biased: bool, rows: int) -> Product:
    """cuBLAS; cuBLASLt where a bias is added."""
    del matrix, rows
    return Product(("cublas", "cublaslt") if biased else ("cublas",))


def own_kernels(matrix: TensorSpec, biased: bool, rows: int) -> Product:
    """An operator that multiplies without a library, and makes its output."""
    del matrix, biased, rows
    return Product((), planned=False)


def steps(
    question: Question, layer: LayerSpec, multiplies: Multiplies, sum_over: str = "o"
) -> list[Step]:
    """One pass of the layer over the question's tokens; the last step's buffer is the output.

    The residual sum is written over the buffer `sum_over`: of attention (`o`) or MLP (`down`).
    """
    tensors = {tensor.name: tensor for tensor in layer.tensors}
    if question.model.alibi:
        found = _eager_with_positions(question, layer)
    else:
        found = [*_attention(question, layer), *_mlp(question, layer)]
    if sum_over != "o" and not question.model.alibi:
        found[-1] = replace(found[-1], last=("o",), in_place=sum_over)
    return [_multiplied(step, tensors, multiplies, question.tokens) for step in found]


def rounded(steps: list[Step]) -> list[Step]:
    """The same pass with products of activations in a byte an element and a scale a row.

    Norms write bytes at once; what attention and the MLP make is rounded into another buffer.
    """
    found: list[Step] = []
    eaten = {"attended": "o", "merged": "o", "product": "down", "activated": "down"}
    for step in steps:
        if step.name in ("normed", "normed_2"):
            found += [replace(step, nbytes=step.nbytes // 2)]
        elif step.name in ("product", "activated"):
            names = (step.in_place or "", *step.last)
            found.append(Step(step.name, step.nbytes // 2, tuple(filter(None, names))))
        else:
            found.append(step)
            if step.name in eaten:
                found.append(Step(f"{step.name}_8", step.nbytes // 2, (step.name,)))
        if step.name in ("o", "down"):
            last = tuple(f"{n}_8" if n in ("attended", "merged") else n for n in step.last)
            found[-1] = replace(step, last=last)
    return found


def _multiplied(
    step: Step, tensors: Mapping[str, TensorSpec], multiplies: Multiplies, rows: int
) -> Step:
    name = _PRODUCTS.get(step.name)
    matrix = tensors.get(f"{name}.weight")
    if matrix is None:
        return step
    product = multiplies(matrix, f"{name}.bias" in tensors, rows)
    return replace(
        step, planned=product.planned, before=product.before, libraries=product.libraries
    )


def _attention(question: Question, layer: LayerSpec) -> list[Step]:
    """Norm, projections, rotation, fused attention, output projection."""
    rows, item = question.tokens, 2
    hidden = item * rows * question.model.hidden_size
    cache = layer.cache
    queries = item * rows * layer.heads * layer.head_size
    keys = item * rows * (cache.kv_heads * cache.key_size)
    found = [Step("normed", hidden), Step("q", queries)]
    normed = any("q_norm" in tensor.name for tensor in layer.tensors)
    if normed:
        # Keys are normed and turned in one kernel, queries after a reduction of their own.
        found += [
            Step("q_mean", _FLOAT * rows * layer.heads),
            Step("k", keys),
            Step("k_turned", keys, ("k",)),
            Step("v", keys, ("normed",)),
            Step("q_turned", queries, ("q", "q_mean")),
        ]
    else:
        found += [
            Step("k", keys),
            Step("v", keys, ("normed",)),
            Step("q_turned", queries, ("q",)),
            Step("k_turned", keys, ("k",)),
        ]
    used = ["q_turned", "k_turned", "v"]
    if question.past:
        # A mask goes with the cache, and with a mask heads of keys and values are written out.
        whole = item * question.batch_size * question.length * layer.heads * layer.head_size
        found += [
            Step("mask", item * question.seq_len * question.length),
            Step("k_repeated", whole),
            Step("v_repeated", whole),
        ]
        used += ["mask", "k_repeated", "v_repeated"]
    statistics = _FLOAT * rows * layer.heads
    found += [
        Step("attended", queries, tuple(used), planned=False, after=(statistics, 16)),
        Step("o", hidden, ("attended",)),
    ]
    return found


def _mlp(question: Question, layer: LayerSpec) -> list[Step]:
    """Norm, MLP or experts, and the sum, which is written over one of its terms."""
    rows, item = question.tokens, 2
    hidden, inner = item * rows * question.model.hidden_size, item * rows * layer.inner
    found = [Step("normed_2", hidden)]
    if layer.experts:
        chosen = item * rows * layer.experts_per_token
        found += [
            Step("gathered", chosen * question.model.hidden_size, ("normed_2",)),
            Step("expert_in", 2 * chosen * layer.expert_inner),
            Step("expert_mid", chosen * layer.expert_inner, ("expert_in",)),
            Step("expert_out", chosen * question.model.hidden_size, ("expert_mid", "gathered")),
            Step("down", hidden, ("expert_out",)),
        ]
    elif layer.gated:
        found += [
            Step("gate", inner),
            Step("up", inner, ("normed_2",)),
            Step("product", inner, ("up",), in_place="gate"),
            Step("down", hidden, ("product",)),
        ]
    else:
        found += [
            Step("up", inner, ("normed_2",)),
            Step("activated", inner, in_place="up"),
            Step("down", hidden, ("activated",)),
        ]
    return [*found, Step("sum", hidden, ("down",), in_place="o")]


def _eager_with_positions(question: Question, layer: LayerSpec) -> list[Step]:
    """BLOOM: one projection for queries, keys and values; scores are written out."""
    rows, item = question.tokens, 2
    hidden = item * rows * question.model.hidden_size
    scores = item * question.batch_size * layer.heads * question.seq_len * question.length
    found = [
        Step("normed", hidden),
        Step("qkv", 3 * hidden, ("normed",)),
    ]
    used = ["qkv"]
    if question.past:
        whole = item * question.batch_size * question.length * question.model.hidden_size
        found += [Step("k_all", whole), Step("v_all", whole)]
        used += ["k_all", "v_all"]
    found += [
        Step("scores", scores, libraries=("cublas",)),
        Step("probabilities", scores, in_place="scores"),
        Step("context", hidden, ("probabilities", *used)),
        Step("merged", hidden, ("context",)),
        Step("o", hidden, ("merged",)),
    ]
    return [*found, *_mlp(question, layer)]


def buffer_sizes(question: Question) -> list[int]:
    """What the model around the layer passes: cosines and sines; or slopes and a mask."""
    layer, item = question.model.widest(), 2
    if question.model.alibi:
        positions = item * question.batch_size * layer.heads * question.length
        return [positions, item * question.seq_len * question.length]
    width = question.model.rotary[0][1] if question.model.rotary else 0
    angles = [item * question.seq_len * width] * 2
    # With a cache a mask of a byte is passed; without, attention is told that it is causal.
    return [*angles, question.seq_len * question.length] if question.past else angles


def head(question: Question) -> list[Step]:
    """After the layers: the last token's norm, and its logits."""
    last = 2 * question.batch_size * question.model.hidden_size
    logits = Step("logits", output_bytes(question), ("last",), planned=False)
    return [Step("last", last, ("sum",), planned=False), logits]


def output_bytes(question: Question) -> int:
    """Hidden states of a layer; a model's logits, of each sequence's last token."""
    if question.whole:
        return 2 * question.batch_size * question.model.vocabulary
    return 2 * question.tokens * question.model.hidden_size
