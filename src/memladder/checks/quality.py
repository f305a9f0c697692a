"""How much a packed model lost: perplexity over a text, and its logits beside a reference's.

The text is read in windows of `context` tokens that end `stride` tokens apart, each a sequence of
its own. Every token but the first is predicted once, after more than context − stride tokens
before it, or all that there are (Hugging Face, "Perplexity of fixed-length models").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Sequence[int]], Tensor]
"""float32 [tokens, vocabulary] of a sequence, on the CPU."""


@dataclass
class Score:
    """Sums over predicted tokens: −log p in nats, and beside the reference: Σ of its centred logits
    squared, Σ of the difference squared, how often the largest logit is the same."""

    tokens: int = 0
    nats: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean of −log p."""
        return math.exp(self.nats / self.tokens)

    @property
    def sqnr_db(self) -> float:
        """Of logits, less each token's mean, which no probability depends on."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def agreement(self) -> float:
        """Share of tokens whose most probable successor is the reference's."""
        return self.agreed / self.tokens


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window begins and ends, and of how many of its last tokens the successor is new.

    >>> list(windows(11, 4, 2))
    [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    >>> list(windows(8, 4, 4))
    [(0, 4, 4), (3, 7, 3)]
    """
    known, end = 0, min(context, count - 1)
    while end > known:
        yield max(0, end - context), end, end - known
        known, end = end, min(end + stride, count - 1)


def judge(
    tokens: Sequence[int],
    reference: Logits,
    others: Mapping[str, Logits],
    *,
    context: int,
    stride: int,
    tell: Callable[[int, int], None],
) -> tuple[Score, dict[str, Score]]:
    """The reference's score, and each other's; at least two tokens are wanted."""
    own, found = Score(), {name: Score() for name in others}
    for first, end, count in windows(len(tokens), context, stride):
        part = tokens[first:end]
        targets = torch.tensor(tokens[end + 1 - count : end + 1])
        wanted = reference(part)[-count:]
        _add(own, wanted, wanted, targets)
        for name, logits in others.items():
            _add(found[name], logits(part)[-count:], wanted, targets)
        tell(end, len(tokens))
    return own, found


def _add(score: Score, logits: Tensor, wanted: Tensor, targets: Tensor) -> None:
    score.tokens += len(targets)
    score.nats += float(
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
    )
    centred = wanted - wanted.mean(dim=1, keepdim=True)
    score.signal += float(torch.linalg.vector_norm(centred, dtype=torch.float64)) ** 2
    lost = logits - logits.mean(dim=1, keepdim=True) - centred
    score.noise += float(torch.linalg.vector_norm(lost, dtype=torch.float64)) ** 2
    score.agreed += int((logits.argmax(dim=1) == wanted.argmax(dim=1)).sum())
