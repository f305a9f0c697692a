"""Where each code of a packed weight lies, found again by plain arithmetic, one code at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memladder import formats
from memladder.core.errors import FormatError
from memladder.formats._shared.base import Format, Quantised
from memladder.kernels.layout import Layout
from memladder.kernels.packed import PackedMatrix, matrix_bytes

SPECS = (
    *formats.names(),
    "fp8:element=e5m2,scale=float16",
    "mxfp8:element=e5m2",
    "int2:group_size=32",
    "int4:group_size=32,zero_point=true",
    "int4:group_size=1024,zero_point=true",
    "nf4:group_size=256",
)
# [out, in] of the projections of LLaMA-2 70B and BLOOM 176B, and the attentions' fused ones.
FIGURE = [
    *((8192, 8192), (1024, 8192), (10240, 8192), (28672, 8192), (57344, 8192), (8192, 28672)),
    *((14336, 14336), (43008, 14336), (57344, 14336), (14336, 57344)),
]
STORED_BITS = {"fp16": 16, "fp8": 8, "int8": 8, "mxfp8": 8, "int4": 4, "nf4": 4, "mxfp4": 4,
               "int2": 2, "int1": 1}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices are small: threads would wait for each other, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def any_matrix(kind: Format, rows: int, columns: int, seed: int = 0) -> Quantised:
    """Every code and every byte of a scale that there can be, NaN too."""
    random = np.random.default_rng((seed, rows, columns))

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(random.integers(256, size=shape, dtype=np.uint8))

    codes = draw(rows, columns * max(1, kind.bits // 8))
    codes = codes.view(torch.int16) if kind.bits == 16 else codes & ((1 << kind.bits) - 1)
    if kind.scale_dtype is None:
        return Quantised(codes)
    groups = -(-columns // (kind.group or columns))
    scales = draw(rows, groups * kind.scale_dtype.itemsize).view(kind.scale_dtype)
    return Quantised(codes, scales, draw(rows, groups) if kind.has_zeros else None)


def normal_matrix(kind: Format, rows: int, columns: int) -> Quantised:
    values = np.random.default_rng((rows, columns)).standard_normal((rows, columns))
    return kind.quantise(torch.from_numpy(values.astype(np.float32)))


def content(matrix: Quantised) -> list[tuple[torch.dtype, torch.Size, bytes] | None]:
    """Bit by bit: NaN is compared like any other."""
    return [
        None if part is None else (part.dtype, part.shape, part.contiguous().numpy().tobytes())
        for part in (matrix.codes, matrix.scales, matrix.zeros)
    ]


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 200), columns=st.integers(1, 700), seed=st.integers(0, 99))
def test_unpacking_is_the_inverse_of_packing(spec: str, rows: int, columns: int, seed: int) -> None:
    kind = formats.get(spec)
    matrix = any_matrix(kind, rows, columns, seed)
    packed = PackedMatrix.pack(kind, matrix)
    assert content(packed.unpack()) == content(matrix)
    assert (packed.rows, packed.columns) == (rows, columns)
    assert packed.codes.is_contiguous()
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == packed.layout.shape
    # A group's scales of neighbouring rows are contiguous.
    for beside, part in ((packed.scales, matrix.scales), (packed.zeros, matrix.zeros)):
        if part is not None:
            assert beside is not None
            assert beside.is_contiguous()
            assert beside.shape == part.shape[::-1]
    assert packed.nbytes == matrix_bytes(kind, rows, columns)


@pytest.mark.parametrize("spec", SPECS)
def test_whole_tiles_take_exactly_their_bits(spec: str) -> None:
    kind = formats.get(spec)
    bits = STORED_BITS[spec.partition(":")[0]]
    for rows, columns in ((64, 512), (192, 1536), (1, 512), (2, 1024), (32, 2560), (128, 1024)):
        matrix = any_matrix(kind, rows, columns)
        packed = PackedMatrix.pack(kind, matrix)
        assert packed.codes.nbytes == packed.layout.nbytes == bits * rows * columns // 8
        beside = sum(part.nbytes for part in (matrix.scales, matrix.zeros) if part is not None)
        assert packed.nbytes == packed.codes.nbytes + beside


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("rows", "columns"), FIGURE)
def test_the_figures_weights_have_no_padding(spec: str, rows: int, columns: int) -> None:
    kind = formats.get(spec)
    bits = STORED_BITS[spec.partition(":")[0]]
    assert Layout.of(kind, rows, columns).nbytes == bits * rows * columns // 8
    assert matrix_bytes(kind, rows, columns) == rows * kind.row_bytes(columns)


def test_what_padding_takes() -> None:
    # 3 rows are padded to 4, 70 to two tiles of 64; columns to tiles of 64 bytes.
    assert matrix_bytes(formats.get("int4"), 3, 130) == 4 * 256 // 2 + 3 * 2 * 2
    assert matrix_bytes(formats.get("int2"), 3, 130) == 4 * 256 // 4 + 3 * 2 * 2
    assert matrix_bytes(formats.get("int1"), 70, 513) == 128 * 1024 // 8 + 70 * 2
    assert matrix_bytes(formats.get("int4:zero_point=true"), 1, 1) == 128 // 2 + 3
    # Rows of 8 and 16 bits are padded to 16 bytes.
    assert matrix_bytes(formats.get("fp16"), 3, 9) == 3 * 32
    assert matrix_bytes(formats.get("mxfp8"), 3, 33) == 3 * 48 + 3 * 2


def thread_columns(lanes: int, step: int, thread: int) -> list[int]:
    """Columns of a tensor core's operand that one of four threads has of one row, in one step.

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", A: a0 … a3 lie at
    2t, 2t + 1, a4 … at 2t + 8, 2t + 9; for mma.m16n8k32 with 8 bits at 4t … 4t + 3 and 16 on.
    """
    half = 4 * lanes
    start = 2 * half * step
    return [start + h * half + thread * lanes + lane for h in (0, 1) for lane in range(lanes)]


def words(spec: str, matrix: Quantised) -> list[int]:
    """32 bits at a time, in the order of memory."""
    packed = PackedMatrix.pack(formats.get(spec), matrix)
    found: list[int] = packed.codes.numpy().reshape(-1).view("<u4").tolist()
    return found


@pytest.mark.parametrize(
    ("spec", "lanes", "mask", "per_word"),
    [
        ("int4", 2, 0x000F_000F, 8),
        ("int2", 2, 0x0003_0003, 16),
        ("int1", 4, 0x0101_0101, 32),
    ],
)
def test_a_shift_and_a_mask_leave_what_a_thread_multiplies(
    spec: str, lanes: int, mask: int, per_word: int
) -> None:
    kind = formats.get(spec)
    tile = 16 * per_word
    matrix = any_matrix(kind, 1, 2 * tile)
    codes = matrix.codes[0].tolist()
    found = words(spec, matrix)
    width = 32 // lanes
    for column_tile in (0, 1):
        for thread in range(4):
            # Four words, one after the other, are the thread's share of the whole tile.
            own = found[16 * column_tile + 4 * thread :][:4]
            unpacked = [
                ((word >> kind.bits * j) & mask) >> width * lane & 0xFFFF_FFFF >> 32 - width
                for word in own
                for j in range(per_word // lanes)
                for lane in range(lanes)
            ]
            steps = range(tile // (8 * lanes))
            expected = [c for step in steps for c in thread_columns(lanes, step, thread)]
            assert unpacked == [codes[tile * column_tile + column] for column in expected]


@pytest.mark.parametrize("spec", ["nf4", "mxfp4"])
def test_codes_for_byte_permutation_are_in_order(spec: str) -> None:
    matrix = any_matrix(formats.get(spec), 1, 128)
    codes = matrix.codes[0].tolist()
    for number, word in enumerate(words(spec, matrix)):
        thread, first = divmod(number, 4)
        columns = thread_columns(2, 2 * first, thread) + thread_columns(2, 2 * first + 1, thread)
        assert [word >> 4 * i & 15 for i in range(8)] == [codes[column] for column in columns]


def test_a_words_codes_by_hand() -> None:
    row = torch.zeros(1, 128, dtype=torch.uint8)
    # What the second thread's first word has: columns 2, 3, 10, 11, 18, 19, 26, 27.
    row[0, [2, 3, 10, 11, 18, 19, 26, 27]] = torch.arange(1, 9, dtype=torch.uint8)
    found = words("int4", Quantised(row))
    assert found[4] == 0x8642_7531
    assert not any(found[:4] + found[5:])
    assert words("nf4", Quantised(row, torch.zeros(1, 2).half()))[4] == 0x8765_4321


def place(row: int, column: int, columns: int, bits: int, lanes: int, rows: int) -> tuple[int, int]:
    """Byte and bit of a code in a matrix of `columns`, in tiles of `rows`: 1, 2, 4 bits."""
    width = 512 // bits
    row_tile, row = divmod(row, rows)
    column_tile, column = divmod(column, width)
    rest, lane = divmod(column, lanes)
    rest, thread = divmod(rest, 4)
    word, pair = divmod(rest, 32 // bits // lanes)
    bit = 32 // lanes * lane + bits * pair
    tile = row_tile * -(-columns // width) + column_tile
    start = (tile * rows + row) * 64
    return start + 16 * thread + 4 * word + bit // 8, bit % 8


@pytest.mark.parametrize(("bits", "lanes"), [(1, 4), (1, 2), (2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize(("rows", "columns", "tile"), [(70, 300, 64), (3, 257, 4), (1, 600, 1)])
def test_every_code_is_where_arithmetic_says(
    bits: int, lanes: int, rows: int, columns: int, tile: int
) -> None:
    layout = Layout(rows, columns, bits, lanes, tile_rows=tile)
    codes = np.random.default_rng(bits).integers(1 << bits, size=(rows, columns), dtype=np.uint8)
    stored = layout.pack(torch.from_numpy(codes)).numpy().reshape(-1)
    # Padding is code 0: what is nobody's place stays zero.
    expected = np.zeros(-(-rows // tile) * tile * -(-columns * bits // 512) * 64, np.uint8)
    for (row, column), code in np.ndenumerate(codes):
        byte, bit = place(row, column, columns, bits, lanes, tile)
        expected[byte] |= code << bit
    assert np.array_equal(stored, expected)


@pytest.mark.parametrize("spec", ["fp16", "fp8", "int8", "mxfp8"])
@pytest.mark.parametrize("columns", [128, 75])
def test_rows_of_whole_bytes_are_left_as_they_are(spec: str, columns: int) -> None:
    kind = formats.get(spec)
    matrix = any_matrix(kind, 11, columns)
    packed = PackedMatrix.pack(kind, matrix)
    data = matrix.codes.numpy().view(np.uint8).reshape(11, -1)
    row = data.shape[1]
    stored = packed.codes.numpy().reshape(11, -1)
    assert stored.shape[1] == -(-row // 16) * 16
    assert np.array_equal(stored[:, :row], data)
    assert not stored[:, row:].any()
    # Nothing is copied for them.
    assert packed.unpack().codes.data_ptr() == packed.codes.data_ptr()


@pytest.mark.parametrize("spec", SPECS)
def test_row_tiles_can_be_packed_one_after_the_other(spec: str) -> None:
    kind = formats.get(spec)
    codes = any_matrix(kind, 150, 333).codes
    layout = Layout.of(kind, *codes.shape)
    parts = [layout.pack(codes[first : first + 64]) for first in (0, 64, 128)]
    assert torch.equal(torch.cat(parts), layout.pack(codes))


@pytest.mark.parametrize("spec", [*SPECS, "int4:group_size=256", "int2:group_size=512"])
def test_tiles_are_slices_of_the_matrix(spec: str) -> None:
    kind = formats.get(spec)
    rows, columns = 150, 2500
    matrix = normal_matrix(kind, rows, columns)
    packed = PackedMatrix.pack(kind, matrix)
    values = kind.dequantise(matrix)
    assert torch.equal(packed.dequantise(), values)
    height, width = packed.layout.tile_rows, packed.layout.tile_columns
    slab = max(width, kind.group or 1)
    # First column and end: slabs from a group's beginning on, one group's inside, all, the end.
    ranges = [(0, slab), (slab, 2 * slab), (0, columns), (2 * slab, columns)]
    if slab > width:
        ranges += [(slab + width, 2 * slab), (slab + width, slab + 2 * width)]
    for top, bottom in ((0, rows), (64, 128), (128, rows)):
        for left, right in ranges:
            part = packed.tiles(
                *(top // height, -(-(bottom - top) // height)),
                *(left // width, -(-(right - left) // width)),
            )
            assert torch.equal(part.codes, matrix.codes[top:bottom, left:right])
            if kind.group is not None or kind.scale_dtype is None or right - left == columns:
                assert torch.equal(kind.dequantise(part), values[top:bottom, left:right])
            else:
                assert part.scales is not None
                assert matrix.scales is not None
                assert torch.equal(part.scales, matrix.scales[top:bottom])


def test_tiles_that_cut_through_groups_are_refused() -> None:
    kind = formats.get("int4:group_size=256")
    packed = PackedMatrix.pack(kind, normal_matrix(kind, 64, 1024))
    # Columns 128 to 384: half of one group and half of the next.
    with pytest.raises(AssertionError):
        packed.tiles(0, 1, 1, 2)


@pytest.mark.parametrize("bits", [3, 5, 6, 12, 32])
def test_bits_that_fill_no_byte_are_refused(bits: int) -> None:
    line = f"^codes of {bits} bits fill no bytes; allowed: 1, 2, 4, 8, 16$"
    with pytest.raises(FormatError, match=line):
        Layout(64, 128, bits)


@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (64, 0)])
def test_an_empty_matrix_is_refused(rows: int, columns: int) -> None:
    line = f"^a matrix of {rows} rows and {columns} columns is empty$"
    for spec in ("int4", "fp8"):
        with pytest.raises(FormatError, match=line):
            Layout.of(formats.get(spec), rows, columns)
