"""In which order a packed weight's codes lie in memory: the order in which kernels read them.

Tensor cores take the weight from registers: of a step along K, each of four neighbouring threads
has its row's numbers t · lanes … in both halves of the step (PTX ISA, fragments of `mma.m16n8k16`
for two lanes, of `m16n8k32` for four; `wgmma`'s are the same). A chunk is 16 bytes, what a thread
loads at once: all that one thread needs of one row for as many steps as fill it. A row's four
chunks follow each other, then the rows of a tile, so that a warp, eight rows by four threads,
reads 512 contiguous bytes. Tiles follow each other along K, then along the rows:

    stored uint8 [row_tiles, column_tiles, tile_rows, 64]
    a tile's column = ((word · pairs + pair) · 4 + chunk) · lanes + lane

with 4 words of 32 bits in a chunk and `pairs` · `lanes` codes in a word. What comes out of an
unpacked word then lies in the thread, and at the place, where the product wants it: nothing is
exchanged between threads. Marlin (Frantar et al. 2024, arXiv:2408.11743, section 3.4) orders its
weights for the same reason.

Inside a word the codes are interleaved for what a kernel unpacks at once: a shift and a mask leave
the lanes of one pair in the low and the high half of the word, where a float16 pair can be made of
them (`(word >> 4j) & 0x000F000F` for 4 bits), or in its four bytes (`(word >> j) & 0x01010101` for
1 bit): Kim et al. 2022, "Who Says Elephants Can't Run" (arXiv:2211.10017), section 3.2. A format
whose codes are looked up by byte permutation has them in order instead (`interleaved` is false).

Codes of 8 and 16 bits need no unpacking: their rows are left whole, as tensor memory copies and
tensor cores want them; a tile then is one chunk of one row.

Rows and columns that fill no tile are padded with code 0; `unpack` drops what was padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from memladder.core.errors import FormatError
from memladder.formats._shared.base import Format

CHUNK_BYTES = 16
CHUNKS = 4
"""Threads that share a row."""
_WORD_BITS = 32
_WORDS = 8 * CHUNK_BYTES // _WORD_BITS
_TILE_ROWS = 64


@dataclass(frozen=True)
class Layout:
    """The place of every code of a matrix [rows, columns] of `bits`-bit codes.

    `lanes` are the numbers that one thread's register takes of a product's operand: 2 of 16 bits,
    4 of 8. Raises FormatError for bits that fill no byte.
    """

    rows: int
    columns: int
    bits: int
    lanes: int = 2
    interleaved: bool = True
    tile_rows: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8, 16):
            raise FormatError(f"codes of {self.bits} bits fill no bytes; allowed: 1, 2, 4, 8, 16")
        if min(self.rows, self.columns) < 1:
            raise FormatError(f"a matrix of {self.rows} rows and {self.columns} columns is empty")
        # In order, a byte holds the lanes of one pair; interleaved, some pairs of one lane.
        assert self.interleaved or self.lanes * self.bits == 8

    @classmethod
    def of(cls, kind: Format, rows: int, columns: int) -> Layout:
        """The layout for a format and a shape."""
        if kind.bits >= 8:
            return cls(rows, columns, kind.bits)
        tile_rows = min(_TILE_ROWS, 1 << (rows - 1).bit_length())
        lanes = 4 if kind.is_integer else 2
        return cls(rows, columns, kind.bits, lanes, kind.is_interleaved, tile_rows)

    @property
    def is_packed(self) -> bool:
        """Whether several codes share a byte."""
        return self.bits < 8

    @property
    def pairs(self) -> int:
        """Groups of `lanes` codes in a word."""
        return _WORD_BITS // self.bits // self.lanes

    @property
    def tile_columns(self) -> int:
        """Codes of a row of a tile."""
        chunk = 8 * CHUNK_BYTES // self.bits
        return CHUNKS * chunk if self.is_packed else chunk

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the stored bytes: row tiles, column tiles, rows of a tile, bytes of such a row."""
        return (
            -(-self.rows // self.tile_rows),
            -(-self.columns // self.tile_columns),
            self.tile_rows,
            CHUNKS * CHUNK_BYTES if self.is_packed else CHUNK_BYTES,
        )

    @property
    def nbytes(self) -> int:
        """Stored bytes, padding included."""
        return math.prod(self.shape)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [rows, columns], uint8 (int16 for 16 bits), to stored bytes.

        `rows` may be some row tiles of the matrix, the first of them at a tile's beginning.
        """
        tiles = -(-codes.shape[0] // self.tile_rows)
        padding = (
            *(0, self.shape[1] * self.tile_columns - codes.shape[1]),
            *(0, tiles * self.tile_rows - codes.shape[0]),
        )
        if any(padding):
            codes = functional.pad(codes, padding)
        if not self.is_packed:
            return codes.contiguous().view(torch.uint8).view(tiles, *self.shape[1:])
        places = self._places(codes.t().contiguous())
        byte = places[0].contiguous()
        for number, place in enumerate(places[1:], start=1):
            byte |= place << number * self.bits
        _, column_tiles, tile_rows, row_bytes = self.shape
        byte = byte.view(column_tiles, row_bytes, tiles, tile_rows)
        return byte.permute(2, 0, 3, 1).contiguous()

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """Stored bytes [row tiles, column tiles, …], any tiles of the matrix, to codes.

        Codes are [rows, columns], where `rows` are those of the tiles, padding included, and
        `columns` of the tiles' columns are kept. Below 8 bits their memory runs along the rows.
        """
        tiles, column_tiles, tile_rows, row_bytes = stored.shape
        rows = tiles * tile_rows
        if not self.is_packed:
            codes = stored.reshape(rows, -1)
            return (codes.view(torch.int16) if self.bits == 16 else codes)[:, :columns]
        byte = stored.permute(1, 3, 0, 2).reshape(column_tiles, row_bytes, rows)
        codes = torch.empty(
            column_tiles * self.tile_columns, rows, dtype=torch.uint8, device=stored.device
        )
        mask = (1 << self.bits) - 1
        for number, place in enumerate(self._places(codes)):
            torch.bitwise_right_shift(byte.view(place.shape), number * self.bits, out=place)
            place &= mask
        return codes[:columns].t()

    def _places(self, codes: Tensor) -> list[Tensor]:
        """Views of codes [columns, rows], one for each place of a code in a byte.

        Each is [column tiles, chunks, words, …, rows], and, but for what is interleaved, in the
        order of the stored bytes.
        """
        rows = codes.shape[1]
        # [column tiles, words, pairs, chunks, lanes, rows]
        parts = codes.view(-1, _WORDS, self.pairs, CHUNKS, self.lanes, rows)
        if not self.interleaved:
            return list(parts.permute(4, 0, 3, 1, 2, 5))
        # A byte has neighbouring pairs of one lane.
        ordered = parts.view(*parts.shape[:2], -1, 8 // self.bits, *parts.shape[3:])
        return list(ordered.permute(3, 0, 4, 1, 5, 2, 6))
