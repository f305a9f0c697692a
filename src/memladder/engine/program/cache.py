"""The key-value cache of a layer: what it is for, and the buffers that are its state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.engine.program.steps import Buffer

POSITIONS = "positions"
"""The scalar of programs that have a cache: int32 [sequences, 3], see `kernels.naive.cached`."""

# A ring's capacity: kernels take so many tokens at a time, which must lie together.
_TILE = 128
# Programs of a GPU that are to be there at once, rows of one, and the shortest part of a past.
_PROGRAMS, _ROWS, _PART = 256, 64, 64
_MOST_PARTS, _LEAST_PARTS = 32, 4
FEW = 16
"""New tokens of a sequence: so few leave a GPU idle if one program walks over all of their past."""


CACHE_FORMATS = ("fp16", "fp8", "int8")


@dataclass(frozen=True)
class CacheShape:
    """What a layer's cache is for: `slots` sequences, each of `context` tokens at the most, of
    which a run brings `chunk` at the most.

    format: of keys and values, `fp16`, `fp8` or `int8`; these two have a float32 scale a head and
    token. window: how many tokens a token of this layer sees, itself among them, as the model's
    configuration says; None for all. A layer that was exported with fewer tokens than that shows
    none, so that it has to be told here. Raises UsageError for any other.
    """

    slots: int
    context: int
    chunk: int
    format: str = "fp16"
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = {"slots": self.slots, "context": self.context, "chunk": self.chunk}
        if self.window is not None:
            sizes["window"] = self.window
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"a cache's {name} is {size}; it is 1 or more")
        if self.chunk > self.context:
            raise UsageError(f"a chunk of {self.chunk} tokens, a context of {self.context}")
        if self.format not in CACHE_FORMATS:
            raise UsageError(
                f"{self.format[:40]!r} is no format of a cache; allowed: {', '.join(CACHE_FORMATS)}"
            )

    def require(self, shape: Workload) -> None:
        """Raise UsageError for a run of more sequences, or of more tokens of one."""
        if shape.batch_size > self.slots or shape.seq_len > self.chunk:
            raise UsageError(
                f"a run of {shape.batch_size} sequences with {shape.seq_len} new tokens each: the "
                f"cache is for {self.slots} sequences, and {self.chunk} new tokens of each"
            )

    def capacity(self, window: int | None) -> int:
        """Tokens of a sequence that are held: the context, or a ring, if that is shorter, of the
        window before a token and a chunk from it on, in whole tiles of 128."""
        if window is None:
            return self.context
        ring = math.ceil((window - 1 + self.chunk) / _TILE) * _TILE
        return min(self.context, ring)

    def state(self, kv_heads: int, head_dim: int, window: int | None) -> tuple[Buffer, ...]:
        """Keys and values of all slots, and their scales."""
        rows = self.slots * kv_heads * self.capacity(window)
        if self.format == "fp16":
            return tuple(Buffer(name, rows, head_dim) for name in ("keys", "values"))
        codes = tuple(Buffer(name, rows, head_dim, "uint8") for name in ("keys", "values"))
        scales = ("key_scales", "value_scales")
        return (*codes, *(Buffer(name, rows, 1, "float32") for name in scales))

    def parts(
        self, sequences: int, rows: int, heads: int, kv_heads: int, window: int | None
    ) -> int:
        """How many parts the past of `rows` new tokens a sequence is divided into, whatever its
        length: 1 where there are programs enough without."""
        blocks = math.ceil(rows * heads / kv_heads / _ROWS)
        wanted = _PROGRAMS // (sequences * kv_heads * blocks)
        if rows == 1:
            # Lengths differ: the longest must not be one program's.
            wanted = max(_LEAST_PARTS, wanted)
        if rows > FEW:
            wanted = 1
        return max(1, min(wanted, _MOST_PARTS, math.ceil(self.capacity(window) / _PART)))
