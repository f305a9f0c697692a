"""Bytes of key-value caches: per token, per sequence, with windows and states."""

from __future__ import annotations

from memladder.frameworks._rules.question import Question, UnpredictableError
from memladder.models.architecture import CacheSpec

_BITS: dict[str, float] = {
    "auto": 16,
    "fp16": 16,
    "bf16": 16,
    "fp8": 8,
    "int8": 8,
    "q8_0": 8.5,
    "q4_0": 4.5,
    "fp32": 32,
}
AS_ACTIVATIONS = ("fp16", "bf16")
"""Of frameworks whose caches are as their activations are."""
_STATE_BITS = 32  # recurrent states are kept in float32, convolutions' tails as activations


def cache_bits(name: str) -> float:
    """Bits of a number of the cache. Raises UnpredictableError for an unknown format."""
    if name not in _BITS:
        raise UnpredictableError(
            f"unknown format {name[:40]!r} of the cache; known: {', '.join(_BITS)}"
        )
    return _BITS[name]


def require(question: Question, formats: tuple[str, ...], who: str) -> None:
    """Raise UnpredictableError for a format that this framework has no cache in."""
    cache_bits(question.cache_format)
    if question.cache_format not in ("auto", *formats):
        raise UnpredictableError(
            f"{who} has no cache in {question.cache_format}; allowed: auto, {', '.join(formats)}"
        )


def kept_tokens(cache: CacheSpec, length: int, chunk: int, block: int) -> int:
    """Tokens of a sequence that a layer keeps: a window also keeps the part being worked off."""
    kept = length if cache.window is None else min(length, cache.window + chunk)
    return -(-kept // block) * block


def sequence_bytes(question: Question, length: int, chunk: int = 0, block: int = 1) -> int:
    """Bytes that one sequence of `length` tokens takes on one rank, all layers in scope."""
    bits = cache_bits(question.cache_format)
    total = 0.0
    for group in question.groups():
        cache = group.layer.cache
        if cache.shared:
            continue
        tokens = kept_tokens(cache, length, chunk, block)
        numbers = cache.token_elements(question.ranks) * bits + cache.indexer * 8
        if cache.indexer:
            numbers += 32  # one float32 scale a token (DeepSeek-V3.2)
        conv, state = cache.sequence_elements(question.ranks)
        total += group.count * (tokens * numbers + conv * 16 + state * _STATE_BITS) / 8
    return round(total)


def token_bytes(question: Question) -> int:
    """Bytes that one more token takes on one rank in the layers that keep every token."""
    far = 1 << 24
    return sequence_bytes(question, far + 1) - sequence_bytes(question, far)
