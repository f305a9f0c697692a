"""From packed words to numbers: portable Triton for every format, PTX for those that pay.

A word holds `PAIRS` groups of `LANES` codes (`kernels.layout`). The portable way unpacks them one
by one and runs anywhere, Triton's interpreter included; the PTX of a format unpacks a word at once,
as float16 pairs, and must give the same numbers bit by bit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl

from memladder import formats
from memladder.kernels.cuda.target import INTERPRETED

# Takes a word apart: codes at bits 4j and 16 + 4j become the float16 pair j, moved by what code 0
# stands for. With the exponent of 1024 in front a code is a float16's last bits, or times 16 the
# next ones (Kim et al. 2022, arXiv:2211.10017, section 3.2).
_INT4 = """
.reg .b32 p<4>, half, offset, sixteenth, offsets;
mov.b32 offset, {minus_1024};
mov.b32 sixteenth, 0x2c002c00;
mov.b32 offsets, {minus_64};
lop3.b32 p0, {word}, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 p1, {word}, 0x00f000f0, 0x64006400, 0xEA;
shr.u32 half, {word}, 8;
lop3.b32 p2, half, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 p3, half, 0x00f000f0, 0x64006400, 0xEA;
add.f16x2 p0, p0, offset;
fma.rn.f16x2 p1, p1, sixteenth, offsets;
add.f16x2 p2, p2, offset;
fma.rn.f16x2 p3, p3, sixteenth, offsets;
"""

# Four codes of 4 bits pick four bytes of a table of 16 in three permutations: of its lower and of
# its upper half by three bits each, then between the two by the fourth. Tables l0 … l3 and h0 … h3
# have the low and the high bytes of the numbers.
_PERMUTE = """
.reg .b32 p<4>, low, which, high, first, second;
{tables}
and.b32 low, {word}, 0x77777777;
shr.u32 which, {word}, 1;
lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;
{half01}
shr.u32 low, low, 16;
shr.u32 which, which, 16;
{half23}
"""
_PERMUTE_HALF = """
prmt.b32 first, l0, l1, low;
prmt.b32 second, l2, l3, low;
prmt.b32 first, first, second, which;
prmt.b32 second, h0, h1, low;
prmt.b32 high, h2, h3, low;
prmt.b32 second, second, high, which;
prmt.b32 p{0}, first, second, 0x5140;
prmt.b32 p{1}, first, second, 0x7362;
"""

# The same by a table of 256 float16 pairs, which a byte, two codes, is the place in. It is there 32
# times, so that every lane of a warp has a bank of shared memory to itself: a fifth of the
# instructions, where nothing else has need of that memory.
_LOOKUP = """
.reg .b32 p<4>, table, lane, at;
mov.u32 table, number_pairs;
mov.u32 lane, %laneid;
shl.b32 lane, lane, 2;
shl.b32 at, {word}, 7;
lop3.b32 at, at, 0x7f80, lane, 0xEA;
add.u32 at, at, table;
ld.shared.b32 p0, [at];
shr.u32 at, {word}, 1;
lop3.b32 at, at, 0x7f80, lane, 0xEA;
add.u32 at, at, table;
ld.shared.b32 p1, [at];
shr.u32 at, {word}, 9;
lop3.b32 at, at, 0x7f80, lane, 0xEA;
add.u32 at, at, table;
ld.shared.b32 p2, [at];
shr.u32 at, {word}, 17;
lop3.b32 at, at, 0x7f80, lane, 0xEA;
add.u32 at, at, table;
ld.shared.b32 p3, [at];
"""

# The table lies in shared memory of its own, beside what Triton allots.
_DECLARE = tl.constexpr(".shared .align 128 .b8 number_pairs[32768]; mov.u32 $0, number_pairs;")
# Pair $2 of byte $1 to all 32 banks; neighbours begin at different ones.
_FILL = tl.constexpr(
    "{ .reg .b32 row, bank, at; mov.u32 row, number_pairs; mad.lo.u32 row, $1, 128, row;"
    " mov.u32 bank, %laneid; and.b32 bank, bank, 7; shl.b32 bank, bank, 4;"
    + 8
    * (
        " add.u32 at, row, bank; st.shared.v4.b32 [at], {$2, $2, $2, $2};"
        " add.u32 bank, bank, 16; and.b32 bank, bank, 112;"
    )
    + " mov.u32 $0, 0; }"
)

_TAKE = "".join(f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, p{j};\n" for j in range(4))

# The pairs as they are, in 32 bits each.
_PAIRS = "".join(f"mov.b32 ${j}, p{j};\n" for j in range(4))

# The same pairs times those of an activation, $2 … $5: four products in float16 each lane, then
# float32.
_DOT = """
.reg .b32 sum; .reg .b16 a, b; .reg .f32 x, y;
mul.rn.f16x2 sum, p0, $2;
fma.rn.f16x2 sum, p1, $3, sum;
fma.rn.f16x2 sum, p2, $4, sum;
fma.rn.f16x2 sum, p3, $5, sum;
mov.b32 {a, b}, sum;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
add.f32 $0, x, y;
"""

# In float32 all along, for numbers that are looked up where tensor cores do not multiply them: four
# products in float16 each lane were 6e-4 off where 5e-4 are allowed (nf4, 37 rows of 528).
_DOT_WIDE = (
    ".reg .b16 a, b, c, d; .reg .f32 sum, x, y;\nmov.f32 sum, 0f00000000;\n"
    + "".join(
        f"mov.b32 {{a, b}}, p{j};\nmov.b32 {{c, d}}, ${j + 2};\n"
        "cvt.f32.f16 x, a;\ncvt.f32.f16 y, c;\nfma.rn.f32 sum, x, y, sum;\n"
        "cvt.f32.f16 x, b;\ncvt.f32.f16 y, d;\nfma.rn.f32 sum, x, y, sum;\n"
        for j in range(4)
    )
    + "mov.f32 $0, sum;\n"
)


def _allow_table(_: int, function: int, *__: object) -> None:
    """Let a kernel that was just loaded have what Triton allots to it besides its table."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute
    device = driver.cuCtxGetDevice()[1]
    limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    most = driver.cuDeviceGetAttribute(limit, device)[1]
    table = driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)[1]
    if table:
        largest = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.cuFuncSetAttribute(function, largest, most - table)
        # All of the memory that it shares with the first level cache: tables are what limits how
        # many programs there are at a time.
        share = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        driver.cuFuncSetAttribute(function, share, 100)


triton.knobs.runtime.kernel_load_end_hook.add(_allow_table)


# What the numbers of a format are multiplied by. float16 does not hold those of nf4, and their
# errors do not cancel: their mean, −1.1e-5, adds up along K where activations have a mean as well.
# After a GELU, 57,344 of them, a product is 3.2e-3 off. Times this the mean is 1e-7, the error
# 1e-4.
_STRETCH = {"nf4": 711 / 512}


def stretch(spec: str) -> float:
    """What `numbers` are multiplied by, and a product's sums are to be divided by."""
    return _STRETCH.get(spec.partition(":")[0], 1.0)


@lru_cache
def numbers(spec: str) -> tuple[float, ...]:
    """What each code of a format stands for, before its scale, times `stretch`."""
    kind = formats.get(spec)
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8).unsqueeze(0)
    return tuple((kind.decode(codes)[0] * stretch(spec)).tolist())


def affine(values: tuple[float, ...]) -> tuple[float, float] | None:
    """Step and offset of evenly spaced numbers; None for others."""
    step = values[1] - values[0]
    even = all(value == values[0] + step * code for code, value in enumerate(values))
    return (step, values[0]) if even else None


def unpack_ptx(spec: str, interleaved: bool) -> str:
    """Word $8 to float16 $0 … $7; empty where a format has only the portable way."""
    body = _body(spec, interleaved, "$8", _permuted)
    return f"{{\n{body}{_TAKE}}}" if body else ""


def dot_ptx(spec: str, interleaved: bool) -> str:
    """Word $1 times the float16 pairs $2 … $5, summed to float32 $0; or empty. Where codes are
    looked up, `lookup` has to have made their table."""
    body = _body(spec, interleaved, "$1", lambda _: _LOOKUP)
    return f"{{\n{body}{_DOT if interleaved else _DOT_WIDE}}}" if body else ""


def pairs_ptx(spec: str, interleaved: bool) -> str:
    """Word $4 to float16 pairs $0 … $3; or empty. `lookup` as for `dot_ptx`."""
    body = _body(spec, interleaved, "$4", lambda _: _LOOKUP)
    return f"{{\n{body}{_PAIRS}}}" if body else ""


def _body(spec: str, interleaved: bool, word: str, table: Callable[[str], str]) -> str:
    values = numbers(spec)
    if INTERPRETED or len(values) != 16:
        return ""
    if interleaved:
        step, first = affine(values) or (0.0, 0.0)
        if step != 1:
            return ""
        text = _INT4.replace("{word}", word)
        return text.replace("{minus_1024}", _pair(first - 1024)).replace(
            "{minus_64}", _pair(first - 64)
        )
    return table(spec).replace("{word}", word)


def _permuted(spec: str) -> str:
    halves = [struct.pack("<e", value) for value in numbers(spec)]
    tables = [
        bytes(half[byte] for half in halves[i : i + 4]) for byte in (0, 1) for i in range(0, 16, 4)
    ]
    given = [
        f".reg .b32 {name}; mov.b32 {name}, {int.from_bytes(table, 'little'):#010x};"
        for name, table in zip(
            ("l0", "l1", "l2", "l3", "h0", "h1", "h2", "h3"), tables, strict=True
        )
    ]
    text = _PERMUTE.replace("{tables}", "\n".join(given))
    for name, one, other in (("{half01}", "0", "1"), ("{half23}", "2", "3")):
        text = text.replace(name, _PERMUTE_HALF.replace("{0}", one).replace("{1}", other))
    return text


def _pair(value: float) -> str:
    """A float16 twice, as 32 bits."""
    return "0x" + 2 * struct.pack(">e", value).hex()


@triton.jit
def decoded(codes, NUMBERS: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr):
    """float32 numbers of int32 codes: evenly spaced ones by arithmetic (STEP is not 0)."""
    if STEP != 0:
        return codes.to(tl.float32) * STEP + OFFSET
    values = tl.zeros_like(codes).to(tl.float32) + NUMBERS[0]
    for code in tl.static_range(1, len(NUMBERS)):
        values = tl.where(codes == code, NUMBERS[code], values)
    return values


@triton.jit
def lookup(NUMBERS: tl.constexpr, PTX: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Fill the table of a format whose PTX looks codes up: once a program, before it loads what is
    looked up."""
    if PTX != "" and not INTERLEAVED:
        tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], dtype=tl.int32,
                                  is_pure=False, pack=1)  # fmt: skip
        code = tl.arange(0, 256)
        low = decoded(code & 15, NUMBERS, 0.0, 0.0).to(tl.float16).to(tl.int16, bitcast=True)
        high = decoded(code >> 4, NUMBERS, 0.0, 0.0).to(tl.float16).to(tl.int16, bitcast=True)
        pair = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
        tl.inline_asm_elementwise(_FILL, "=r,r,r", [code, pair], dtype=tl.int32, is_pure=False,
                                  pack=1)  # fmt: skip
        tl.debug_barrier()


@triton.jit
def shifts(BITS: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
           INTERLEAVED: tl.constexpr):  # fmt: skip
    """At which bit of a word code [pair, lane] begins."""
    pair = tl.arange(0, PAIRS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    if INTERLEAVED:
        return BITS * pair + (32 // LANES) * lane
    return BITS * (LANES * pair + lane)


@triton.jit
def unpacked(word, ROWS: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr,
             PAIRS: tl.constexpr, LANES: tl.constexpr, INTERLEAVED: tl.constexpr,
             NUMBERS: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr,
             PTX: tl.constexpr, INTEGER: tl.constexpr):  # fmt: skip
    """Words [ROWS, TILES · 16] of some tiles to numbers [ROWS, TILES · columns of a tile]:
    float16, or int8 where INTEGER."""
    word = tl.reshape(word, (ROWS, TILES, 4, 4))
    if PTX != "":
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r", [word],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                   tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=1)  # fmt: skip
        low = tl.join(tl.join(a, b), tl.join(c, d))
        high = tl.join(tl.join(e, f), tl.join(g, h))
        # [row, tile, chunk, word, lane, pair's lower bit, pair's upper bit]
        values = tl.permute(tl.join(low, high), (0, 1, 3, 6, 5, 2, 4))
    elif INTEGER and BITS == 1:
        # Four bits at a time to four bytes, −1 or 1.
        pair = tl.arange(0, PAIRS)[None, None, None, None, :]
        four = (word[:, :, :, :, None] >> pair) & 0x01010101
        four = -1 - four * 0xFE
        low = tl.join(four.to(tl.int8), (four >> 8).to(tl.int8))
        high = tl.join((four >> 16).to(tl.int8), (four >> 24).to(tl.int8))
        values = tl.permute(tl.join(low, high), (0, 1, 3, 4, 2, 6, 5))
    else:
        at = tl.reshape(shifts(BITS, PAIRS, LANES, INTERLEAVED), (1, 1, 1, 1, PAIRS, LANES))
        codes = (word[:, :, :, :, None, None] >> at) & ((1 << BITS) - 1)
        values = decoded(codes, NUMBERS, STEP, OFFSET)
        values = tl.permute(values.to(tl.int8 if INTEGER else tl.float16), (0, 1, 3, 4, 2, 5))
    return tl.reshape(values, (ROWS, TILES * 16 * PAIRS * LANES))
