"""Cases: a layer or more of a model, under a framework, at a workload, on a device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memladder.core.errors import UsageError
from memladder.core.serial import younger

MAX_BATCH_SIZE = 65_536
MAX_SEQ_LEN = 1_048_576
MAX_PAST = 16_777_216
MAX_TOKENS = 16_777_216
MAX_CACHED_TOKENS = 1 << 30
MAX_LAYERS = 4096
ALL = "all"

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_DEVICE = re.compile(r"cpu|cuda:\d+")


@dataclass(frozen=True, order=True)
class Workload:
    """One pass: batch size × sequence length, in new tokens, and the past of each sequence.

    `past` tokens a sequence are in a key-value cache, which has room for the new ones too; with
    none there is no cache.

    >>> Workload.parse("1x4096").tokens
    4096
    >>> Workload.parse("32x1+1024")
    Workload(batch_size=32, seq_len=1, past=1024)
    """

    batch_size: int
    seq_len: int
    past: int = younger(0)

    def __post_init__(self) -> None:
        for name, value, least, limit in (
            ("batch_size", self.batch_size, 1, MAX_BATCH_SIZE),
            ("seq_len", self.seq_len, 1, MAX_SEQ_LEN),
            ("past", self.past, 0, MAX_PAST),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= limit:
                raise UsageError(f"{name} {value!r} is not a whole number from {least} to {limit}")
        if self.tokens > MAX_TOKENS:
            raise UsageError(
                f"batch_size {self.batch_size} x seq_len {self.seq_len} is {self.tokens} tokens; "
                f"at most {MAX_TOKENS} are allowed"
            )
        if self.past and self.cached_tokens > MAX_CACHED_TOKENS:
            raise UsageError(
                f"batch_size {self.batch_size} with past {self.past} is {self.cached_tokens} "
                f"tokens in the cache; at most {MAX_CACHED_TOKENS} are allowed"
            )

    @property
    def tokens(self) -> int:
        """New tokens in the batch: rows of every matrix product."""
        return self.batch_size * self.seq_len

    @property
    def length(self) -> int:
        """Tokens of one sequence, past and new."""
        return self.past + self.seq_len

    @property
    def cached_tokens(self) -> int:
        """Tokens that a cache has room for: past and new ones of all sequences."""
        return self.batch_size * self.length

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read `BATCHxSEQ` or `BATCHxSEQ+PAST`, e.g. `32x1+1024`. Raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,18})\s*[xX×]\s*(\d{1,18})\s*(?:\+\s*(\d{1,18})\s*)?", text)
        if match is None:
            raise UsageError(
                f"shape {text!r} is not of the form BATCHxSEQ or BATCHxSEQ+PAST, "
                "e.g. 1x4096 or 1x1+4096"
            )
        return cls(int(match[1]), int(match[2]), int(match[3] or 0))

    def __str__(self) -> str:
        past = f"+{self.past}" if self.past else ""
        return f"{self.batch_size}x{self.seq_len}{past}"


@dataclass(frozen=True)
class Case:
    """One cell: model × framework × workload × device (`cpu` or `cuda:N`) × scope.

    `layers` is the scope: 1 is a decoder layer alone; a larger number is so many of the model's
    layers with embeddings, final norm and head around them; `all` is the whole model.

    >>> Case("llama", "ladder_fp16_int4", Workload(1, 4096), "cpu").id
    'llama_ladder_fp16_int4_1_4096'
    >>> Case("llama", "vllm", Workload(1, 1, past=8192), "cuda:0", layers="all").id
    'llama_vllm_1_1_p8192_all'
    """

    model: str
    framework: str
    shape: Workload
    device: str
    layers: int | str = younger(1)

    def __post_init__(self) -> None:
        for kind, name in (("model", self.model), ("framework", self.framework)):
            if not _NAME.fullmatch(name):
                raise UsageError(f"{kind} name {name!r} is not lower-case words joined by '_'")
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"device {self.device!r} is not cpu or cuda:N")
        check_layers(self.layers)

    @property
    def whole(self) -> bool:
        """Is it a model, of all or some of its layers, and not a layer alone?"""
        return self.layers != 1

    @property
    def id(self) -> str:
        """The case's name everywhere: file, table, figure, printed line."""
        past = f"_p{self.shape.past}" if self.shape.past else ""
        scope = {1: "", ALL: "_all"}.get(self.layers, f"_l{self.layers}")
        sizes = f"{self.shape.batch_size}_{self.shape.seq_len}"
        return f"{self.model}_{self.framework}_{sizes}{past}{scope}"


def check_layers(layers: int | str) -> None:
    """Raise UsageError unless it is `all` or a number of layers."""
    whole = isinstance(layers, int) and not isinstance(layers, bool)
    if layers != ALL and not (whole and 1 <= int(layers) <= MAX_LAYERS):
        raise UsageError(
            f"layers {str(layers)[:40]!r} is not {ALL} or a whole number from 1 to {MAX_LAYERS}"
        )
