"""A few PTX instructions, evaluated one by one: PTX ISA 8.7, sections 9.7.1 to 9.7.9."""

from __future__ import annotations

import re
import struct

import numpy as np


def run(
    text: str, operands: dict[str, int], shared: dict[int, int] | None = None
) -> dict[str, int | float]:
    """Registers after a block of instructions: bits, or for .f32 the number. `shared` is memory,
    words by their address, which the block may change."""
    shared = {} if shared is None else shared
    registers: dict[str, int | float] = dict(operands)
    for statement in text.strip().strip("{}").split(";"):
        words = statement.replace("\n", " ").strip()
        if not words or words.startswith(".reg"):
            continue
        name, _, rest = words.partition(" ")
        groups = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if name == "st.shared.v4.b32":
            at = int(registers[groups[0].strip("[]")])
            assert at % 16 == 0, "misaligned"
            for number, part in enumerate(groups[1].strip("{}").split(",")):
                shared[at + 4 * number] = int(registers[part.strip()])
            continue
        if name == "ld.shared.b32":
            registers[groups[0]] = shared[int(registers[groups[1].strip("[]")])]
            continue
        found = _result(name, [_value(part, registers) for part in groups[1:]])
        if groups[0].startswith("{"):
            low, high = (part.strip() for part in groups[0].strip("{}").split(","))
            assert isinstance(found, int)
            registers[low], registers[high] = found & 0xFFFF, found >> 16
        else:
            registers[groups[0]] = found
    return registers


def half(bits: int) -> float:
    """A float16 from its bits."""
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def bits(value: float) -> int:
    """A number as float16, rounded to nearest even."""
    return int(np.float16(value).view(np.uint16))


def _value(text: str, registers: dict[str, int | float]) -> int | float:
    if text.startswith("0f"):
        return float(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    return int(text, 0) if text[0].isdigit() else registers[text]


def _result(name: str, operands: list[int | float]) -> int | float:
    if name == "add.f32":
        return float(np.float32(operands[0]) + np.float32(operands[1]))
    if name == "fma.rn.f32":
        # float64 holds a product of two float16 exactly; the sum is rounded twice, hardly ever to
        # another number.
        return float(np.float32(operands[0] * operands[1] + operands[2]))
    if name == "mov.f32":
        return float(operands[0])
    a, b, c, table = (int(part) for part in [*operands, 0, 0, 0][:4])
    if name == "cvt.f32.f16":
        return half(a)
    if name in ("mov.b32", "mov.u32"):
        return a
    if name == "add.u32":
        return (a + b) % 2**32
    if name == "mad.lo.u32":
        return (a * b + c) % 2**32
    if name == "shl.b32":
        return (a << b) % 2**32
    if name == "shr.u32":
        return a >> b
    if name == "and.b32":
        return a & b
    if name == "lop3.b32":
        # Bit by bit the table's entry that a, b and c number.
        chosen = (
            table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)
        )
        return sum(bit << i for i, bit in enumerate(chosen))
    if name == "prmt.b32":
        pool = a | b << 32
        assert not c & 0x8888, "sign replication"
        return sum((pool >> 8 * (c >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
    lanes = [[half(part >> shift & 0xFFFF) for part in (a, b, c)] for shift in (0, 16)]
    # float64 holds a product of two float16 exactly, and its sum with a third.
    rule = {
        "add.f16x2": lambda x, y, _: x + y,
        "mul.rn.f16x2": lambda x, y, _: x * y,
        "fma.rn.f16x2": lambda x, y, z: x * y + z,
    }[name]
    low, high = (bits(rule(*lane)) for lane in lanes)
    return low | high << 16
