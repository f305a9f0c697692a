"""Which framework, in which format, on which GPU: what fits, and how much further it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from memladder.core.errors import UsageError
from memladder.core.prediction import Prediction
from memladder.frameworks._rules.question import UnpredictableError
from memladder.predictor import predict
from memladder.predictor.gpus import Gpu
from memladder.predictor.model import Model

# Formats in the order of what they lose, the least first.
LOSS = ("checkpoint", "fp16", "fp8", "mxfp8", "int4", "nf4", "q4_0", "int1")
# Rows of a framework and a format; a format in brackets is a setting of the row's rules.
ROWS = (
    ("vllm", "fp16", None),
    ("vllm", "fp8", "fp8"),
    ("vllm_fp16_int4", "int4", None),
    ("llamacpp_int4", "q4_0", None),
    ("ladder", "fp16", None),
    ("ladder_fp8_fp8", "fp8", None),
    ("ladder_mxfp8_mxfp8", "mxfp8", None),
    ("ladder_fp16_int4", "int4", None),
    ("ladder_fp16_nf4", "nf4", None),
    ("ladder_int8_int1", "int1", None),
    ("pytorch", "fp16", None),
    ("torchao_fp8_fp8", "fp8", None),
    ("torchao_fp16_int4", "int4", None),
    ("bitsandbytes_fp16_nf4", "nf4", None),
    ("gemlite_fp16_int4", "int4", None),
)
_SPLITS = ("vllm", "vllm_fp16_int4")
_MOST = 1 << 24
_TRIES = 24
_LIMIT = 1 << 22


@dataclass(frozen=True)
class Fit:
    """One row on one kind of GPU. `left_bytes` is below 0 where it does not fit, on each GPU.

    `most_context` are tokens a sequence can have at the batch asked for (at most the model's
    positions), `most_batch` sequences at
    the context asked for; 0 where none, None where the row is not answered. All is predicted.
    """

    gpu: str
    gpus: int
    framework: str
    format: str
    needed_bytes: int | None
    low_bytes: int | None
    high_bytes: int | None
    left_bytes: int | None
    most_context: int | None
    most_batch: int | None
    known: str = "predicted"
    reason: str | None = None
    cheapest: bool = False

    @property
    def fits(self) -> bool:
        """Whether it does, by the prediction itself."""
        return self.left_bytes is not None and self.left_bytes >= 0

    @property
    def surely(self) -> bool:
        """Whether it does at the upper end of the prediction's interval."""
        assert self.left_bytes is not None
        assert self.high_bytes is not None
        assert self.needed_bytes is not None
        return self.left_bytes >= self.high_bytes - self.needed_bytes


def fit(
    model: Model,
    gpus: Sequence[tuple[Gpu, int]],
    *,
    batch_size: int = 1,
    context: int = 4096,
    cache_format: str = "auto",
) -> tuple[Fit, ...]:
    """Every row on every GPU: those that fit first, by what they lose and what is left.

    `context` counts a sequence's tokens, the new one among them. Raises UsageError.
    """
    if not 1 <= context <= _MOST:
        raise UsageError(f"context {context!r} is not a whole number from 1 to {_MOST}")
    found: list[Fit] = []
    for gpu, count in gpus:
        rows = [
            _row(model, gpu, count, name, form, setting, batch_size, context, cache_format)
            for name, form, setting in rows_of(model)
        ]
        found += _ranked(rows)
    return tuple(found)


def rows_of(model: Model) -> Iterable[tuple[str, str, str | None]]:
    """Framework, format, and the setting that makes it, of each row that a model is tried in."""
    for name, form, setting in ROWS:
        if model.architecture.quantisation is not None and (name, form) == ("vllm", "fp16"):
            yield name, "checkpoint", None
        else:
            yield name, form, setting


def _ranked(rows: list[Fit]) -> list[Fit]:
    """What fits first, the least loss first, then the most that is left; the first is marked."""
    rows.sort(key=lambda row: (not row.fits, LOSS.index(row.format), -(row.left_bytes or -_MOST)))
    if rows and rows[0].fits:
        rows[0] = Fit(**{**rows[0].__dict__, "cheapest": True})
    return rows


def _row(
    model: Model,
    gpu: Gpu,
    count: int,
    name: str,
    form: str,
    setting: str | None,
    batch_size: int,
    context: int,
    cache_format: str,
) -> Fit:
    ranks = count if name in _SPLITS else 1
    needed = _needs(model, gpu, name, setting, ranks, cache_format)
    try:
        asked = needed(batch_size, context)
    except (UnpredictableError, UsageError) as error:
        return Fit(gpu.name, count, name, form, None, None, None, None, None, None,
                   reason=str(error))  # fmt: skip
    room = gpu.usable_bytes
    limit = model.architecture.positions or _MOST
    return Fit(
        gpu.name, count, name, form, asked.total_bytes, asked.low_bytes, asked.high_bytes,
        room - asked.total_bytes,
        min(_most(lambda n: needed(batch_size, n), context, room), limit),
        _most(lambda n: needed(n, context), batch_size, room),
    )  # fmt: skip


def _needs(
    model: Model, gpu: Gpu, name: str, setting: str | None, ranks: int, cache_format: str
) -> Callable[[int, int], Prediction]:
    device = predict.device_of(gpu)
    settings = {"weight_format": setting} if setting else {}

    @cache
    def needed(batch_size: int, tokens: int) -> Prediction:
        question = predict.question(
            model, device, batch_size=batch_size, seq_len=1, past=tokens - 1, layers=None,
            ranks=ranks, cache_format=cache_format, settings=settings,
        )  # fmt: skip
        return predict.answer(model, name, question)

    return needed


def _most(needed: Callable[[int], Prediction], start: int, room: int) -> int:
    """The largest number, within a 256th, for which there is room; 0 where there is not for 1.

    Memory grows nearly in proportion, so that lines through two of its values find it.
    """
    low, high = (0, _floor(needed(start))), (_LIMIT, float("inf"))
    guess = start
    for _ in range(_TRIES):
        size = _bytes(needed, guess)
        if size <= room:
            low = (guess, size)
        else:
            high = (guess, size)
        if high[0] - low[0] <= max(low[0] // 256, 1):
            break
        guess = _between(low, high, start, needed, room)
    return low[0]


def _between(
    low: tuple[int, float],
    high: tuple[int, float],
    start: int,
    needed: Callable[[int], Prediction],
    room: int,
) -> int:
    """Where the line through both ends, or the cache's growth beyond the lower, meets the room."""
    if high[1] == float("inf"):
        growth = max(needed(start).ledger.nbytes("kv_cache") / start, 1.0)
    else:
        growth = max((high[1] - low[1]) / (high[0] - low[0]), 1.0)
    found = low[0] + int((room - low[1]) / growth)
    return min(max(found, low[0] + 1), high[0] - 1)


def _floor(found: Prediction) -> float:
    """What is needed for none: what does not grow."""
    return float(found.total_bytes - found.ledger.nbytes("kv_cache"))


def _bytes(needed: Callable[[int], Prediction], number: int) -> float:
    try:
        return needed(number).total_bytes
    except UsageError:
        return float("inf")


def summary(rows: Iterable[Fit]) -> str:
    """One line: the least loss that fits, or by how much the closest misses."""
    answered = [row for row in rows if row.left_bytes is not None]
    fitting = [row for row in answered if row.fits]
    if fitting:
        best = min(fitting, key=lambda row: LOSS.index(row.format))
        return f"least loss that fits: {best.framework} ({best.format}) on {_named(best)}"
    if not answered:
        return "no row could be answered"
    closest = max(answered, key=lambda row: row.left_bytes or 0)
    assert closest.left_bytes is not None
    short = -closest.left_bytes
    return (
        f"fits nowhere: the closest, {closest.framework} ({closest.format}) on {_named(closest)}, "
        f"is {short / (1 << 30):.1f} GiB short"
    )


def _named(row: Fit) -> str:
    return f"{row.gpus}x{row.gpu}" if row.gpus > 1 else row.gpu
