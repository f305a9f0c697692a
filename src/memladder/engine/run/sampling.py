"""The next token of logits, on the host: greedy, or by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memladder.core.errors import UsageError


class Sampler:
    """temperature 0 takes the largest logit, the first of equal ones; otherwise a token is drawn by
    softmax(logits / temperature), from the fewest most probable ones that have `top_p` together
    (Holtzman et al. 2019, arXiv:1904.09751).

    The draws of a sequence depend on the seed and on its number alone.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, sequences: int) -> None:
        """Raises UsageError for numbers that are none of these."""
        if not 0 <= temperature <= 100:
            raise UsageError(f"temperature {temperature} is not from 0 to 100")
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p {top_p} is not above 0 and up to 1")
        if not 0 <= seed < 1 << 63:
            raise UsageError(f"seed {seed} is not a whole number from 0 to {(1 << 63) - 1}")
        self.is_greedy = temperature == 0
        self._temperature, self._top_p = temperature, top_p
        self._generators = [
            torch.Generator().manual_seed((seed + number) % (1 << 63))
            for number in range(sequences)
        ]

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> list[int]:
        """A token for each row of float32 [sequences, vocabulary], on the CPU; `sequences` are
        their numbers."""
        if self.is_greedy:
            largest = logits == logits.amax(dim=1, keepdim=True)
            return largest.to(torch.uint8).argmax(dim=1).tolist()
        return [
            self._drawn(row, self._generators[number])
            for row, number in zip(logits, sequences, strict=True)
        ]

    def _drawn(self, row: Tensor, generator: torch.Generator) -> int:
        probabilities, order = torch.softmax(row.double() / self._temperature, 0).sort(
            descending=True, stable=True
        )
        before = probabilities.cumsum(0) - probabilities
        probabilities = torch.where(before < self._top_p, probabilities, 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])
