"""Embeddings, what becomes of logits, and the choice of the next token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memladder.kernels.cuda.target import overlap, wait
from memladder.kernels.packed import PackedMatrix

_BLOCK = 1024


@triton.jit
def _embed(ids, codes, scales, zeros, numbers, out, rows, columns, factor, row_bytes, tile_bytes,
           BITS: tl.constexpr, LANES: tl.constexpr, INTERLEAVED: tl.constexpr,
           TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
           SCALES: tl.constexpr, ZEROS: tl.constexpr, PDL: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    # Of a row tile all column tiles follow each other, each with its rows.
    base = codes + (row // TILE_ROWS) * tile_bytes + (row % TILE_ROWS) * row_bytes
    if BITS == 16:
        values = tl.load(base.to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0.0)
        values = values.to(tl.float32)
    else:
        if BITS == 8:
            code = tl.load(base + at, mask=inside, other=0).to(tl.int32)
        else:
            PAIRS: tl.constexpr = 32 // BITS // LANES
            place = at % TILE_COLUMNS
            lane, chunk = place % LANES, place // LANES % 4
            pair, word = place // (LANES * 4) % PAIRS, place // (LANES * 4 * PAIRS)
            if INTERLEAVED:
                shift = lane * (32 // LANES) + pair * BITS
            else:
                shift = (pair * LANES + lane) * BITS
            byte = (at // TILE_COLUMNS) * (TILE_ROWS * 64) + chunk * 16 + word * 4 + shift // 8
            code = tl.load(base + byte, mask=inside, other=0).to(tl.int32)
            code = (code >> (shift % 8)) & ((1 << BITS) - 1)
        values = tl.load(numbers + code, mask=inside, other=0.0)
        group = at // GROUP * rows + row
        if ZEROS:
            values -= tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
        if SCALES == "e8m0":
            # 2^(code − 127) by way of the exponent's bits; the smallest is a subnormal.
            power = tl.load(scales + group, mask=inside, other=0).to(tl.int32)
            bits = tl.where(power == 0, 1 << 22, power << 23)
            values *= bits.to(tl.float32, bitcast=True)
        else:
            values *= tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * columns + at, (values * factor).to(tl.float16), mask=inside)


def embed(
    ids: Tensor,
    weight: PackedMatrix,
    out: Tensor,
    *,
    factor: float = 1.0,
    numbers: Tensor | None = None,
) -> None:
    """The twin of `naive.embed`."""
    layout, kind = weight.layout, weight.format
    assert (numbers is None) == (layout.bits == 16)
    row_bytes = 64 if layout.is_packed else layout.shape[1] * layout.shape[3]
    _embed[(len(ids), triton.cdiv(weight.columns, _BLOCK))](
        ids, weight.codes, weight.scales, weight.zeros, numbers, out,
        weight.rows, weight.columns, factor, row_bytes, layout.shape[1] * layout.tile_rows * 64
        if layout.is_packed else row_bytes,
        BITS=layout.bits, LANES=layout.lanes, INTERLEAVED=layout.interleaved,
        TILE_ROWS=layout.tile_rows, TILE_COLUMNS=layout.tile_columns,
        GROUP=kind.group or weight.columns,
        SCALES="e8m0" if kind.scale_dtype == torch.uint8 else "float",
        ZEROS=weight.zeros is not None, BLOCK=_BLOCK, **overlap(),
    )  # fmt: skip


@triton.jit
def _add_positions(x, table, positions, out, queries, columns, start, offset, PDL: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    sequence, query = row // queries, row % queries
    past = tl.load(positions + sequence * 3 + 1).to(tl.int64)
    new = tl.load(positions + sequence * 3 + 2)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    place = (past + start + offset + query) * columns + at
    # A row of padding has no position.
    taken = at < tl.where(start + query < new, columns, 0)
    values += tl.load(table + place, mask=taken, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, values.to(tl.float16), mask=inside)


def add_positions(
    x: Tensor, table: Tensor, positions: Tensor, out: Tensor, *, start: int, offset: int
) -> None:
    """The twin of `naive.add_positions`."""
    rows, columns = x.shape
    _add_positions[(rows, triton.cdiv(columns, _BLOCK))](
        x, table, positions, out, rows // len(positions), columns, start, offset,
        BLOCK=_BLOCK, **overlap(),
    )  # fmt: skip


@triton.jit
def _last_rows(x, positions, out, queries, columns, PDL: tl.constexpr, BLOCK: tl.constexpr):
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    new = tl.load(positions + sequence * 3 + 2)
    row = sequence * queries + tl.minimum(tl.maximum(new - 1, 0), queries - 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    tl.store(out + sequence * columns + at, tl.load(x + row * columns + at, mask=inside),
             mask=inside)  # fmt: skip


def last_rows(x: Tensor, positions: Tensor, out: Tensor) -> None:
    """The twin of `naive.last_rows`."""
    sequences, columns = out.shape
    _last_rows[(sequences, triton.cdiv(columns, _BLOCK))](
        x, positions, out, len(x) // sequences, columns, BLOCK=_BLOCK, **overlap()
    )


@triton.jit
def _cap_logits(x, out, count, factor, softcap, CAPPED: tl.constexpr, PDL: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    wait(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < count, other=0.0) * factor
    if CAPPED:
        values = softcap * (2.0 * tl.sigmoid(2.0 * values / softcap) - 1.0)
    tl.store(out + at, values, mask=at < count)


def cap_logits(x: Tensor, out: Tensor, *, factor: float, softcap: float) -> None:
    """The twin of `naive.cap_logits`."""
    count = x.numel()
    _cap_logits[(triton.cdiv(count, _BLOCK),)](
        x, out, count, factor, softcap, CAPPED=softcap != 0, BLOCK=_BLOCK, **overlap()
    )


@triton.jit
def _choose_largest(logits, ids, columns, PDL: tl.constexpr, BLOCK: tl.constexpr):
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        values = tl.load(logits + row * columns + at, mask=at < columns, other=-float("inf"))
        wrong |= (values != values).to(tl.int32)
        larger = values > most
        most = tl.where(larger, values, most)
        place = tl.where(larger, at, place)
    # The first of equal ones.
    top = tl.max(most)
    first = tl.min(tl.where(most == top, place, columns))
    tl.store(ids + row, tl.where(tl.max(wrong) > 0, columns, first))


def choose_largest(logits: Tensor, ids: Tensor) -> None:
    """The twin of `naive.choose_largest`."""
    rows, columns = logits.shape
    block = min(8192, triton.next_power_of_2(columns))
    _choose_largest[(rows,)](logits, ids, columns, BLOCK=block, num_warps=16, **overlap())
