"""Causal attention over a key-value cache, whose positions are read on the GPU.

As `attention.py`, after Dao 2023 (arXiv:2307.08691), algorithm 1. A program has one head of keys
and values, and some rows of the query heads that share it: each key that is read is multiplied with
all of them. Few new tokens leave most of a GPU idle: their past is divided into parts, each a
program's, and what these have found is added up by a second kernel in the order of the past (Dao et
al. 2023, "Flash-Decoding"). How a past is divided depends on its length and on the number of parts
alone, so that a sequence's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memladder.core.errors import UnavailableError
from memladder.kernels.cuda.target import capability, has_wgmma, overlap, prefetch, wait
from memladder.kernels.cuda.tuning import choice

_LOG2E = tl.constexpr(1.4426950408889634)
# Finite: a block may hold no key that a query sees.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _share(lowest, stop, PARTS: tl.constexpr, KEYS: tl.constexpr):
    """How many tokens each part of a past has: whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(stop - lowest, PARTS), KEYS), 1) * KEYS


@triton.jit
def _lowest_seen(position, window, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """The block's first token that holds what a token at a position sees first."""
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(position - window + 1, 0) // KEYS * KEYS
    return lowest


@triton.jit
def _tile(held, tiles, row, at, inside, MASKED: tl.constexpr, COPIED: tl.constexpr):
    """Keys or values [KEYS, WIDTH] as float16, by the copy engine where it is `COPIED`."""
    if COPIED:
        tile = tiles.load([row.to(tl.int32), 0])
    else:
        tile = tl.load(held + at, mask=inside, other=0.0) if MASKED else tl.load(held + at)
    return tile.to(tl.float16)


@triton.jit
def _step(q, keys, values, key_tiles, value_tiles, key_scales, value_scales, base, token, stop,
          position, scale, slope, origin, window, cap, capacity, most, total, sums,
          D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
          WINDOW: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, EXACT: tl.constexpr,
          MASKED: tl.constexpr, COPIED: tl.constexpr):  # fmt: skip
    place = token
    if WINDOW:
        place = token % capacity
    lane = tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)
    row = base + place
    at = row * D + (lane[:, None] * D + column[None, :])
    there = token + lane < stop
    inside = there[:, None] & (column < D)[None, :]
    PARTLY: tl.constexpr = MASKED or WIDTH != D
    b_k = _tile(keys, key_tiles, row, at, inside, PARTLY, COPIED)  # [KEYS, WIDTH]
    scores = tl.dot(q, tl.trans(b_k)) * scale  # [ROWS, KEYS]
    if SCALED:
        scores *= tl.load(key_scales + row + lane, mask=there, other=0.0)[None, :]
    # The softmax is to the base of 2.
    if CAPPED:
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
    scores *= _LOG2E
    key = token + lane
    if ALIBI:
        # A query's own position moves all of its scores alike.
        scores += slope[:, None] * (key - origin).to(tl.float32)[None, :]
    if MASKED:
        distance = position[:, None] - key[None, :]
        seen = distance >= 0
        if WINDOW:
            seen &= distance < window
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    old = tl.exp2(most - new)
    total = total * old + tl.sum(weights, axis=1)
    sums *= old[:, None]
    b_v = _tile(values, value_tiles, row, at, inside, PARTLY, COPIED)  # [KEYS, WIDTH]
    if SCALED:
        # Weights that float16 holds: relative to the block's largest scale.
        scales = tl.load(value_scales + row + lane, mask=there, other=0.0)
        largest = tl.max(scales)
        weights *= (scales / largest)[None, :]
    rounded = weights.to(tl.float16)
    products = tl.dot(rounded, b_v) if SCALED else tl.dot(rounded, b_v, sums)
    if EXACT:
        rest = (weights - rounded.to(tl.float32)).to(tl.float16)
        products = tl.dot(rest, b_v, products)
    if SCALED:
        sums += products * largest
    else:
        sums = products
    return new, total, sums


@triton.jit
def _attend(query, keys, values, key_tiles, value_tiles, key_scales, value_scales, positions,
            slopes, out, partial, queries, start, heads, kv_heads, capacity, scale, window, cap,
            D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
            PARTS: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
            SCALED: tl.constexpr, EXACT: tl.constexpr, COPIED: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    # The last queries see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    sequence = tl.program_id(2)
    # No kernel just before this one changes positions.
    slot = tl.load(positions + 3 * sequence)
    first = tl.load(positions + 3 * sequence + 1) + start
    count = tl.load(positions + 3 * sequence + 2) - start
    count = tl.minimum(tl.maximum(count, 0), queries)
    group = heads // kv_heads
    # Rows: the group's heads of a query, then those of the next.
    row = block * ROWS + tl.arange(0, ROWS)
    own, token = head * group + row % group, row // group
    position = first + token
    column = tl.arange(0, WIDTH)
    at = (sequence.to(tl.int64) * queries + token) * heads + own
    inside = (token < queries)[:, None] & (column < D)[None, :]
    low = block * ROWS // group
    high = tl.minimum((block * ROWS + ROWS - 1) // group, count - 1)
    begin = _lowest_seen(first + low, window, WINDOW, KEYS)
    stop = tl.where(low < count, first + high + 1, 0)
    if PARTS > 1:
        lowest = _lowest_seen(first, window, WINDOW, KEYS)
        share = _share(lowest, first + count, PARTS, KEYS)
        begin = tl.maximum(begin, lowest + part * share)
        stop = tl.minimum(stop, lowest + (part + 1) * share)
    base = (slot * kv_heads + head).to(tl.int64) * capacity
    if PARTS > 1:
        # What was there before this run may come near already.
        LINE: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, KEYS * WIDTH // LINE) * LINE
        near = begin % capacity if WINDOW else begin
        near = tl.where(line < tl.minimum(first - begin, KEYS) * D, near * D + line, 0) + base * D
        prefetch(keys + near, PDL)
        prefetch(values + near, PDL)
    slope = tl.zeros((ROWS,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + own, mask=token < queries, other=0.0) * _LOG2E
    most = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    wait(PDL)
    # Rows of padding may hold anything.
    known = (token < count)[:, None] & (column < D)[None, :]
    q = tl.load(query + (at * D)[:, None] + column[None, :], mask=known, other=0.0)
    whole = begin
    if not WINDOW:
        # Keys that all of the rows see.
        whole += tl.maximum(tl.minimum(first + low + 1, stop) - begin, 0) // KEYS * KEYS
        for key in range(begin, whole, KEYS):
            most, total, sums = _step(q, keys, values, key_tiles, value_tiles, key_scales,
                                      value_scales, base, key, stop, position, scale, slope, first,
                                      window, cap, capacity, most, total, sums, D, WIDTH, KEYS,
                                      ALIBI, WINDOW, CAPPED, SCALED, EXACT, False,
                                      COPIED)  # fmt: skip
    # The copy engine does not mask: what it would bring from beyond the last token may be NaN.
    for key in range(whole, stop, KEYS):
        most, total, sums = _step(q, keys, values, key_tiles, value_tiles, key_scales,
                                  value_scales, base, key, stop, position, scale, slope, first,
                                  window, cap, capacity, most, total, sums, D, WIDTH, KEYS,
                                  ALIBI, WINDOW, CAPPED, SCALED, EXACT, True, False)  # fmt: skip
    if PARTS > 1:
        at = at * PARTS + part
        tl.store(partial + (at * D)[:, None] + column[None, :], sums, mask=inside)
        numbers = partial + tl.num_programs(2).to(tl.int64) * queries * heads * PARTS * D
        tl.store(numbers + 2 * at, most, mask=token < queries)
        tl.store(numbers + 2 * at + 1, total, mask=token < queries)
    else:
        total = tl.where(token < count, total, 1.0)
        found = tl.where((token < count)[:, None], sums / total[:, None], 0.0)
        tl.store(out + (at * D)[:, None] + column[None, :], found.to(tl.float16), mask=inside)


@triton.jit
def _add_up(partial, positions, out, queries, start, window, D: tl.constexpr, WIDTH: tl.constexpr,
            PARTS: tl.constexpr, PLACES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence = row // queries
    first = tl.load(positions + 3 * sequence + 1) + start
    count = tl.load(positions + 3 * sequence + 2) - start
    count = tl.minimum(tl.maximum(count, 0), queries)
    lowest = _lowest_seen(first, window, WINDOW, KEYS)
    used = tl.cdiv(first + count - lowest, _share(lowest, first + count, PARTS, KEYS))
    part = tl.arange(0, PLACES)
    column = tl.arange(0, WIDTH)
    at = (row.to(tl.int64) * heads + head) * PARTS + part
    numbers = partial + tl.num_programs(0).to(tl.int64) * heads * PARTS * D
    there = part < used
    wait(PDL)
    most = tl.load(numbers + 2 * at, mask=there, other=_LOWEST)
    total = tl.load(numbers + 2 * at + 1, mask=there, other=0.0)
    inside = there[:, None] & (column < D)[None, :]
    sums = tl.load(partial + (at * D)[:, None] + column[None, :], mask=inside, other=0.0)
    weights = tl.exp2(most - tl.max(most))
    is_token = row % queries < count
    total = tl.where(is_token, tl.sum(total * weights), 1.0)
    found = tl.where(is_token, tl.sum(sums * weights[:, None], axis=0) / total, 0.0)
    at = (row.to(tl.int64) * heads + head) * D + column
    tl.store(out + at, found.to(tl.float16), mask=column < D)


@dataclass(frozen=True)
class Cut:
    """A program's rows, keys at a time, warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# By rows, and by what takes registers besides: heads of more than 128 columns, codes that are made
# numbers.
_CUTS = {
    "16 rows": (Cut(16, 64, 4, 3), Cut(16, 128, 8, 2), Cut(16, 32, 4, 4)),
    "32 rows": (Cut(32, 64, 4, 3),),
    "64 rows": (Cut(64, 64, 4, 3),),
    "64 rows codes": (Cut(64, 32, 8, 3),),
    "16 rows wide": (Cut(16, 32, 8, 3),),
    "32 rows wide": (Cut(32, 32, 8, 2),),
    "64 rows wide": (Cut(32, 32, 8, 2),),
    "many": (Cut(128, 64, 8, 3),),
    "many copied": (Cut(128, 64, 8, 3), Cut(64, 64, 4, 3)),
    "many codes": (Cut(64, 32, 8, 3),),
    "many wide": (Cut(32, 32, 8, 2),),
    # Without asynchronous products more lies in registers.
    "16 rows held": (Cut(16, 64, 4, 2),),
    "32 rows held": (Cut(32, 32, 4, 2),),
    "64 rows held": (Cut(64, 32, 8, 2),),
    "64 rows codes held": (Cut(64, 32, 8, 2),),
    "16 rows wide held": (Cut(16, 32, 4, 2),),
    "32 rows wide held": (Cut(32, 32, 8, 2),),
    "64 rows wide held": (Cut(64, 32, 8, 1),),
    "many held": (Cut(64, 32, 4, 2),),
    "many codes held": (Cut(64, 32, 8, 2),),
    "many wide held": (Cut(32, 32, 8, 1),),
}


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    heads: int,
    kv_heads: int,
    capacity: int,
    start: int,
    slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    format: str = "fp16",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    exact: bool = False,
    partial: Tensor | None = None,
) -> None:
    """As `naive.cached_attention`."""
    d = keys.shape[1]
    sequences = len(positions)
    queries, group = len(query) // sequences, heads // kv_heads
    parts = 1 if partial is None else len(partial) // (len(query) * heads)
    width = max(16, triton.next_power_of_2(d))
    kind = _kind(queries * group, parts, width, key_scales is not None)
    copied = kind == "many" and not window and d % 8 == 0
    if copied:
        kind += " copied"
    cut = choice("cached_attention", kind, _CUTS[kind])
    codes = element(format)
    held = [keys.view(codes), values.view(codes)]
    tiles: list[Tensor | TensorDescriptor] = list(held)
    if copied:
        shape, stride = list(keys.shape), [d, 1]
        tiles = [TensorDescriptor(x, shape, stride, [cut.keys, width]) for x in held]
    options = {"D": d, "WIDTH": width, "KEYS": cut.keys, "PARTS": parts, "WINDOW": window > 0}
    options |= overlap()
    _attend[(triton.cdiv(queries * group, cut.rows), kv_heads * parts, sequences)](
        *(query, *held, *tiles),
        query if key_scales is None else key_scales,
        query if value_scales is None else value_scales,
        positions,
        query if slopes is None else slopes,
        *(out, out if partial is None else partial),
        *(queries, start, heads, kv_heads, capacity, d**-0.5, window, softcap),
        **options,
        ROWS=cut.rows,
        ALIBI=slopes is not None,
        CAPPED=softcap > 0,
        SCALED=key_scales is not None,
        EXACT=exact,
        COPIED=copied,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if parts > 1:
        _add_up[(len(query), heads)](
            *(partial, positions, out, queries, start, window),
            **options,
            PLACES=triton.next_power_of_2(parts),
            num_warps=4,
        )


def _kind(rows: int, parts: int, width: int, scaled: bool) -> str:
    """The class of shapes that a cut is chosen for."""
    most = 64 if parts > 1 else 128
    size = min(most, max(16, triton.next_power_of_2(rows)))
    kind = f"{size} rows" if size < 128 else "many"
    if width > 128:
        kind += " wide"
    elif scaled and size > 32:
        kind += " codes"
    return kind if has_wgmma() else f"{kind} held"


def element(format: str) -> torch.dtype:
    """How a cache's codes are read. Raises UnavailableError for a format that the GPU has not."""
    name = format.partition(":")[0]
    if name == "fp8" and capability() < 89:
        raise UnavailableError("a cache in fp8 needs a GPU of compute capability 8.9")
    return {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[name]
