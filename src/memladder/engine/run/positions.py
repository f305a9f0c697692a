"""Where sequences are in the key-value cache: what changes from run to run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.engine.program.cache import POSITIONS, CacheShape


class Positions:
    """Where the sequences of a run are in their slots: the scalar that all layers' programs of a
    shape share.

    `tensor` int32 [sequences, 3] is on the device, for `Execution(…, scalars=positions.scalars)`:
    a sequence's slot, the tokens that it has had before the run (its past), and how many of its
    rows are new tokens; the rows after these are padding, and a sequence of no new token is idle.
    The host keeps the same numbers, so that nothing has to be asked of a GPU, and refuses what does
    not fit before it is written.
    """

    def __init__(self, cache: CacheShape, shape: Workload, device: torch.device) -> None:
        """All sequences idle. `shape`: of the programs. Raises UsageError as `CacheShape.require`
        does."""
        cache.require(shape)
        self._cache, self._shape = cache, shape
        self.host = torch.zeros(shape.batch_size, 3, dtype=torch.int32)
        """The same numbers."""
        self.tensor = self.host.to(device, copy=True)

    @property
    def scalars(self) -> dict[str, Tensor]:
        """By the name that programs know it by."""
        return {POSITIONS: self.tensor}

    def set(self, slots: Sequence[int], past: Sequence[int], new: Sequence[int]) -> None:
        """Of the next run, a number a sequence each.

        Raises UsageError, and changes nothing, where a sequence would have more tokens than the
        context, brings more than the program has rows, or has no slot of its own.
        """
        cache, shape = self._cache, self._shape
        rows = list(zip(slots, past, new, strict=True))
        if len(rows) != shape.batch_size:
            raise UsageError(f"{len(rows)} sequences; the program has {shape.batch_size}")
        busy = [slot for slot, _, count in rows if count]
        for slot, before, count in rows:
            if not 0 <= slot < cache.slots or busy.count(slot) > 1:
                raise UsageError(
                    f"slot {slot} is not there, or taken twice: 0 to {cache.slots - 1}"
                )
            if not 0 <= count <= shape.seq_len:
                raise UsageError(f"{count} new tokens of a sequence: {shape.seq_len} are the most")
            if before < 0:
                raise UsageError(f"a past of {before} tokens: 0 or more")
            if before + count > cache.context:
                raise UsageError(
                    f"the cache is full: {before} tokens and {count} new ones are "
                    f"{before + count}, the context is {cache.context}"
                )
        self.host.copy_(torch.tensor(rows, dtype=torch.int32))
        self.tensor.copy_(self.host)
