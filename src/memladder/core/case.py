"""What is measured: one model layer, under one framework, at one shape, on one device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memladder.core.errors import UsageError

MAX_BATCH_SIZE = 65_536
MAX_SEQ_LEN = 1_048_576
MAX_TOKENS = 16_777_216

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_DEVICE = re.compile(r"cpu|cuda:\d+")


@dataclass(frozen=True, order=True)
class Workload:
    """Batch size × sequence length, in tokens; no key-value cache from earlier tokens.

    >>> Workload.parse("1x4096").tokens
    4096
    """

    batch_size: int
    seq_len: int

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("batch_size", self.batch_size, MAX_BATCH_SIZE),
            ("seq_len", self.seq_len, MAX_SEQ_LEN),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise UsageError(f"{name} {value!r} is not a whole number from 1 to {limit}")
        if self.tokens > MAX_TOKENS:
            raise UsageError(
                f"batch_size {self.batch_size} x seq_len {self.seq_len} is {self.tokens} tokens; "
                f"at most {MAX_TOKENS} are allowed"
            )

    @property
    def tokens(self) -> int:
        """Tokens in the batch: rows of every matrix product."""
        return self.batch_size * self.seq_len

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read `BATCHxSEQ`, e.g. `32x1`. Raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,18})\s*[xX×]\s*(\d{1,18})\s*", text)
        if match is None:
            raise UsageError(f"shape {text!r} is not of the form BATCHxSEQ, e.g. 1x4096")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}"


@dataclass(frozen=True)
class Case:
    """One cell: model × framework × shape × device (`cpu` or `cuda:N`).

    >>> Case("llama", "ladder_fp16_int4", Workload(1, 4096), "cpu").id
    'llama_ladder_fp16_int4_1_4096'
    """

    model: str
    framework: str
    shape: Workload
    device: str

    def __post_init__(self) -> None:
        for kind, name in (("model", self.model), ("framework", self.framework)):
            if not _NAME.fullmatch(name):
                raise UsageError(f"{kind} name {name!r} is not lower-case words joined by '_'")
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"device {self.device!r} is not cpu or cuda:N")

    @property
    def id(self) -> str:
        """The case's name everywhere: file, table, figure, printed line."""
        return f"{self.model}_{self.framework}_{self.shape.batch_size}_{self.shape.seq_len}"
