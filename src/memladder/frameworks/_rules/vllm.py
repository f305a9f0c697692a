"""vLLM's memory. Rules from its source (vllm/v1/worker) and from memladder's records of 0.22.1.

By default the engine is as memladder sets it up (`_shared/vllm_engine.py`: eager, prompts in
parts of 512 tokens, a cache of the case's size). The settings `max_num_seqs`,
`max_num_batched_tokens`, `gpu_memory_utilization` and `cuda_graphs` describe a server; with a
utilization the cache fills what that leaves.
"""

from __future__ import annotations

from memladder.core.ledger import Entry, Known
from memladder.core.units import GIB, MIB
from memladder.frameworks._rules import caches, stored
from memladder.frameworks._rules.question import Answer, Question, UnpredictableError
from memladder.models.architecture import LayerSpec

VERSION = "0.22.1"
# The first minor version whose sampler does not sort the whole vocabulary.
_LEAN_SAMPLER = (0, 17)
_OLDEST = (0, 11)
_BLOCK = 16
_CHUNK = 512
_VOCABULARY = 64  # of the model of one layer (vllm_engine.VOCABULARY)
# Kernels and libraries, of twelve records on an H100; a server's is what its logs call non-torch.
_MODULES = 160 * MIB
_SERVER_MODULES = GIB // 4
# NCCL, custom all-reduce and symmetric memory (logs of 0.19, two ranks and more: 2.06 to 2.21 GiB).
_COMMUNICATION = round(1.9 * GIB)
_CUBLAS = 32 * MIB
_CUBLASLT = MIB
_PAGE = 20 * MIB
_REPACKED = 30 * MIB
# 51 graphs; logs say 0.5 to 1.9 GiB.
_GRAPHS = round(1.2 * GIB)


def predict(question: Question, scheme: stored.Scheme | None) -> Answer:
    """Context to slack; with `gpu_memory_utilization` the cache is what is left."""
    caches.require(question, (*caches.AS_ACTIVATIONS, "fp8"), "vLLM")
    minor = _minor(question.version or VERSION)
    named = question.settings.get("weight_format")
    if named is not None:
        scheme = stored.scheme(named)
    server = "max_num_seqs" in question.settings or "gpu_memory_utilization" in question.settings
    quantises = stored.checkpoint(question.model) if scheme is None else stored.everywhere(scheme)
    held = stored.stored(question, quantises)
    seqs = question.number("max_num_seqs", question.batch_size)
    tokens = question.number(
        "max_num_batched_tokens", max(question.batch_size, min(question.tokens, _CHUNK))
    )
    around = _around(question, held.around)
    notes: list[str] = []
    entries = [
        Entry("context", question.device.context_bytes, Known.ASSUMED),
        Entry("modules", _modules(question, server), Known.ASSUMED),
        Entry("weights", held.weights, Known.DERIVED),
        Entry("scales", held.scales, Known.DERIVED),
        Entry("embeddings", around, Known.DERIVED, "tables, head, norms; angles"),
        Entry("workspace", _workspace(question), Known.DERIVED, "cuBLAS"),
        Entry("activations", activations(question, tokens, seqs, minor, server), Known.DERIVED),
    ]
    spread_bytes = 8 * MIB
    if question.number("cuda_graphs", 0):
        entries.append(Entry("graphs", _GRAPHS, Known.ASSUMED, "0.5 to 1.9 GiB in logs"))
        spread_bytes += _GRAPHS // 2
        notes.append("CUDA graphs are not modelled: logs say 0.5 to 1.9 GiB")
    if question.ranks > 1:
        spread_bytes += GIB // 8
    entries.append(_cache(question, entries, tokens))
    if not server:
        entries.append(_slack(entries))
        spread_bytes += _PAGE
    if minor < _LEAN_SAMPLER or minor > _minor(VERSION):
        notes.append(f"the rules were tried on 0.11, 0.19 and {VERSION}")
    return Answer(tuple(entries), 0.02, spread_bytes, tuple(notes), question.version or VERSION)


def _slack(entries: list[Entry]) -> Entry:
    """The large pool's last page and one of the small; what repacking a quantised matrix left, and
    holes of a fifth of the activations, in pages (twelve records)."""
    sizes = {entry.category: entry.nbytes for entry in entries}
    names = ("weights", "scales", "workspace", "activations", "kv_cache")
    slack = -sum(sizes.get(name, 0) for name in names) % _PAGE + 2 * MIB
    if sizes.get("scales"):
        slack += _REPACKED
    elif sizes["activations"] > _PAGE:
        slack += -(-sizes["activations"] // (5 * _PAGE)) * _PAGE
    return Entry("allocator_slack", slack, Known.ASSUMED, "pages of 20 MiB, in part")


def _minor(version: str) -> tuple[int, int]:
    parts = version.split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        raise UnpredictableError(f"vLLM version {version[:40]!r} is not of the form 0.19") from None
    if found < _OLDEST:
        raise UnpredictableError(f"vLLM {version[:40]}: the rules are of 0.11 and later")
    return found


def _modules(question: Question, server: bool) -> int:
    size = _SERVER_MODULES if server else _MODULES
    return size + (_COMMUNICATION if question.ranks > 1 else 0)


def _workspace(question: Question) -> int:
    """cuBLAS's 32 MiB (sm_90), and cuBLASLt's where a product adds a bias."""
    layer = question.model.widest()
    biased = any(t.name.endswith("proj.bias") for t in layer.tensors)
    return _CUBLAS + (_CUBLASLT if biased else 0)


def _around(question: Question, tables: int) -> int:
    """Tables and head, or those of the model of one layer; and rotary tables of all positions."""
    model = question.model
    angles = sum(2 * max(rows, question.length + 1) * width for rows, width in model.rotary)
    if question.whole:
        return tables + angles + _absorbed(question)
    norms = 2 + 2 * model.alibi
    return 2 * model.hidden_size * (_VOCABULARY + norms) + angles


def _absorbed(question: Question) -> int:
    """MLA of a quantised checkpoint: keys' and values' up-projections once more, in bfloat16."""
    if question.model.quantisation is None:
        return 0
    size = 0
    for group in question.groups():
        for tensor in group.layer.tensors:
            if tensor.name == "self_attn.kv_b_proj.weight":
                size += group.count * 2 * tensor.elements_of_rank(question.ranks, 1)
    return size


def activations(
    question: Question, tokens: int, seqs: int, minor: tuple[int, int], server: bool
) -> int:
    """The highest of a layer's activations for `tokens` and of sampling `seqs` rows of logits."""
    model, ranks = question.model, question.ranks
    layer = model.widest()
    body = 2 * tokens * (_inner(layer, ranks) + 2 * model.hidden_size)
    if layer.experts:
        body += _expert_workspace(question, layer, tokens)
    if not question.whole:
        return body
    vocabulary = -(-model.vocabulary // 64) * 64
    if minor < _LEAN_SAMPLER:
        # Sorted logits and their indices; the hidden states, and those that are sampled, twice.
        sampling = 38 * seqs * vocabulary + 2 * (tokens + 2 * seqs) * model.hidden_size
        return max(body, sampling) + 5 * MIB
    sampling = 14 * seqs * vocabulary + 4 * tokens * model.hidden_size
    if layer.experts:
        sampling += _expert_workspace(question, layer, tokens)
    # 0.053 GiB in logs of servers: cuBLAS's workspace (counted apart) and inputs.
    return max(body, sampling) + (22 * MIB if server else 0)


def _inner(layer: LayerSpec, ranks: int) -> int:
    """Widths of an MLP's activations a token: gate, up and their product; or in and out."""
    return -(-(3 if layer.gated else 2) * layer.inner // ranks)


def _expert_workspace(question: Question, layer: LayerSpec, tokens: int) -> int:
    """The two buffers that experts share (fused_moe/modular_kernel.py): they stay allocated.

    Experts in mxfp4 are multiplied by kernels that gather inside and need none.
    """
    config = question.model.quantisation or {}
    if config.get("quant_method") == "mxfp4":
        return 0
    inner = -(-layer.expert_inner // question.ranks)
    hidden = question.model.hidden_size
    return 2 * tokens * layer.experts_per_token * (max(2 * inner, hidden) + max(inner, hidden))


def _cache(question: Question, entries: list[Entry], tokens: int) -> Entry:
    """Blocks of 16 tokens and one for padding; or all that the utilization leaves."""
    share = question.settings.get("gpu_memory_utilization")
    if share is not None:
        budget = question.fraction("gpu_memory_utilization", 0.9) * question.device.usable_bytes
        counted = sum(entry.nbytes for entry in entries if entry.category != "context")
        left = round(budget) - counted
        if left <= 0:
            raise UnpredictableError(
                f"vLLM leaves no room for a cache: {counted} bytes are taken of {round(budget)}"
            )
        return Entry("kv_cache", left, Known.DERIVED, "what the utilization leaves")
    one = caches.sequence_bytes(question, question.length, tokens, _BLOCK)
    null = caches.sequence_bytes(question, _BLOCK)
    return Entry("kv_cache", question.batch_size * one + null, Known.DERIVED)
