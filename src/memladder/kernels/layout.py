"""In which order a packed weight's codes lie in memory: the order in which kernels read them.

A chunk is 16 bytes: neighbouring codes of one output row along K, what one GPU thread loads at
once. Chunks of `tile_rows` rows lie next to each other, so that a warp's threads, one a row, read
512 contiguous bytes; a tile of `tile_rows` × `tile_columns` codes is one contiguous block, and
tiles follow each other along K, then along the rows:

    stored uint8 [row_tiles, column_tiles, chunks, tile_rows, 16]

Inside each 32-bit word of a chunk the codes are interleaved for `lanes`, the numbers that a kernel
unpacks at once: with 2 lanes a shift and a mask leave codes 2j and 2j + 1 in the low and the high
half of the word, where a float16 pair can be made of them (`(word >> 4j) & 0x000F000F` for 4 bits);
with 4 lanes codes 4j … 4j + 3 in the four bytes, ready for an int8 dot product. Kim et al. 2022,
"Who Says Elephants Can't Run" (arXiv:2211.10017), section 3.2 introduced this interleaving; the
order across threads is chosen as in Marlin (Frantar et al. 2024, arXiv:2408.11743, section 3.4),
so that packing pays for it once.

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

from memladder.errors import FormatError
from memladder.formats.base import Format

CHUNK_BYTES = 16
_WORD_BYTES = 4
_TILE_ROWS = 64
_TILE_COLUMNS = 128


@dataclass(frozen=True)
class Layout:
    """The place of every code of a matrix [rows, columns] of `bits`-bit codes.

    `tile_columns` is a multiple of a chunk's codes. Raises FormatError for bits that fill no byte.
    """

    rows: int
    columns: int
    bits: int
    lanes: int
    tile_rows: int
    tile_columns: int

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8, 16):
            raise FormatError(f"codes of {self.bits} bits fill no bytes; allowed: 1, 2, 4, 8, 16")
        if min(self.rows, self.columns) < 1:
            raise FormatError(f"a matrix of {self.rows} rows and {self.columns} columns is empty")
        assert self.tile_columns % self.chunk == 0

    @classmethod
    def of(cls, kind: Format, rows: int, columns: int) -> Layout:
        """The layout for a format and a shape."""
        chunk = 8 * CHUNK_BYTES // kind.bits
        if kind.bits >= 8:
            return cls(rows, columns, kind.bits, kind.lanes, 1, chunk)
        tile_rows = min(_TILE_ROWS, 1 << (rows - 1).bit_length())
        return cls(rows, columns, kind.bits, kind.lanes, tile_rows, max(chunk, _TILE_COLUMNS))

    @property
    def chunk(self) -> int:
        """Codes in 16 bytes."""
        return 8 * CHUNK_BYTES // self.bits

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the stored bytes: row tiles, column tiles, chunks, rows of a tile, 16."""
        return (
            -(-self.rows // self.tile_rows),
            -(-self.columns // self.tile_columns),
            self.tile_columns // self.chunk,
            self.tile_rows,
            CHUNK_BYTES,
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
        if self.bits >= 8:
            return codes.contiguous().view(torch.uint8).view(tiles, *self.shape[1:])
        places = codes.t().contiguous().view(self.shape[1], *self._places, -1)
        byte = places[..., 0, :, :].clone()
        for place in range(1, 8 // self.bits):
            byte |= places[..., place, :, :] << place * self.bits
        _, column_tiles, chunks, tile_rows, _ = self.shape
        # [column tiles, chunks, words, bytes of a lane, lanes, rows]
        byte = byte.transpose(3, 4).reshape(column_tiles, chunks, CHUNK_BYTES, tiles, tile_rows)
        return byte.permute(3, 0, 1, 4, 2).contiguous()

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """Stored bytes [row tiles, column tiles, …], any tiles of the matrix, to codes.

        Codes are [rows, columns], where `rows` are those of the tiles, padding included, and
        `columns` of the tiles' columns are kept. Below 8 bits their memory runs along the rows.
        """
        tiles, column_tiles, chunks, tile_rows, _ = stored.shape
        rows = tiles * tile_rows
        if self.bits >= 8:
            codes = stored.reshape(rows, -1)
            return (codes.view(torch.int16) if self.bits == 16 else codes)[:, :columns]
        words, lane_bytes, places, lanes = self._places[1:]
        byte = stored.permute(1, 2, 4, 0, 3).reshape(column_tiles, chunks, words, lanes, -1, rows)
        byte = byte.transpose(3, 4)
        codes = torch.empty(
            column_tiles, chunks, words, lane_bytes, places, lanes, rows, dtype=torch.uint8
        )
        mask = (1 << self.bits) - 1
        for place in range(places):
            target = codes[..., place, :, :]
            torch.bitwise_right_shift(byte, place * self.bits, out=target)
            target &= mask
        return codes.view(column_tiles * self.tile_columns, rows)[:columns].t()

    @property
    def _places(self) -> tuple[int, int, int, int, int]:
        """How a tile's columns are told apart, below 8 bits, from the slowest to the fastest:
        chunks, words of a chunk, bytes of a lane, places in a byte, lanes."""
        words = CHUNK_BYTES // _WORD_BYTES
        return self.shape[2], words, _WORD_BYTES // self.lanes, 8 // self.bits, self.lanes
