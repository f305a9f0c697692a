"""The PTX that unpacks words, instruction by instruction: Triton's interpreter can't run it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from memladder import formats
from memladder.kernels.cuda import decode
from tests.unit import ptx

SPECS = ["int4", "int4:zero_point=true", "nf4", "mxfp4"]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "INTERPRETED", False)


def packed(codes: list[int], interleaved: bool) -> int:
    """Eight codes as a word (`kernels.layout`)."""
    places = [16 * (i % 2) + 4 * (i // 2) if interleaved else 4 * i for i in range(8)]
    return sum(code << place for code, place in zip(codes, places, strict=True))


def rows_of_codes() -> list[list[int]]:
    # Every code at every place, then any.
    generator = random.Random(0)
    every = [[(code + place) % 16 for place in range(8)] for code in range(16)]
    return every + [[generator.randrange(16) for _ in range(8)] for _ in range(100)]


def numbers(spec: str, codes: list[int]) -> list[float]:
    """As float16, from the format itself, stretched as the kernels' are."""
    decoded = formats.get(spec).decode(torch.tensor([codes], dtype=torch.uint8))
    return (decoded[0] * decode.stretch(spec)).half().tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_a_word_becomes_its_eight_numbers(spec: str) -> None:
    interleaved = formats.get(spec).is_interleaved
    text = decode.unpack_ptx(spec, interleaved)
    for codes in rows_of_codes():
        found = ptx.run(text, {"$8": packed(codes, interleaved)})
        halves = [ptx.half(int(found[f"${i}"])) for i in range(8)]
        assert halves == numbers(spec, codes)


@pytest.mark.parametrize("spec", SPECS)
def test_a_word_becomes_four_pairs(spec: str) -> None:
    interleaved = formats.get(spec).is_interleaved
    text = decode.pairs_ptx(spec, interleaved)
    shared = {} if interleaved else table(spec, 0)
    for number, codes in enumerate(rows_of_codes()):
        operands = {"$4": packed(codes, interleaved)}
        operands |= {"number_pairs": 1024, "%laneid": number % 32}
        found = ptx.run(text, operands, shared)
        bits = [int(found[f"${i // 2}"]) >> 16 * (i % 2) & 0xFFFF for i in range(8)]
        assert [ptx.half(each) for each in bits] == numbers(spec, codes)


def table(spec: str, lane: int) -> dict[int, int]:
    """Shared memory after a lane has filled its share, which is here all of it."""
    shared: dict[int, int] = {}
    for code in range(256):
        low, high = (ptx.bits(value) for value in numbers(spec, [code & 15, code >> 4]))
        operands = {"$1": code, "$2": high << 16 | low, "number_pairs": 1024, "%laneid": lane}
        ptx.run(decode._FILL.value, operands, shared)
    return shared


def test_a_pair_goes_to_all_banks() -> None:
    for lane in (0, 5, 31):
        shared = table("nf4", lane)
        assert sorted(shared) == list(range(1024, 1024 + 32768, 4))
        for at, pair in shared.items():
            code = (at - 1024) // 128
            halves = [ptx.half(pair & 0xFFFF), ptx.half(pair >> 16)]
            assert halves == numbers("nf4", [code & 15, code >> 4])


@pytest.mark.parametrize("spec", SPECS)
def test_a_word_times_eight_numbers(spec: str) -> None:
    interleaved = formats.get(spec).is_interleaved
    text = decode.dot_ptx(spec, interleaved)
    shared = {} if interleaved else table(spec, 0)
    generator = np.random.default_rng(0)
    for number, codes in enumerate(rows_of_codes()):
        x = generator.standard_normal(8).astype(np.float16)
        units = x.view(np.uint32).tolist()
        operands = {"$1": packed(codes, interleaved)}
        operands |= {f"${2 + j}": unit for j, unit in enumerate(units)}
        operands |= {"number_pairs": 1024, "%laneid": number % 32}
        found = ptx.run(text, operands, shared)["$0"]
        terms = np.array(numbers(spec, codes)) * x.astype(np.float64)
        # Four roundings of partial sums to float16, or eight to float32.
        rounding = 4 * 2**-11 if interleaved else 8 * 2**-24
        assert abs(found - terms.sum()) <= rounding * np.abs(terms).sum()


def test_rounded_numbers_do_not_add_up_where_activations_have_a_mean() -> None:
    kind = formats.get("nf4")
    generator = torch.Generator().manual_seed(0)
    quantised = kind.quantise(torch.randn(64, 57344, generator=generator))
    x = torch.nn.functional.gelu(torch.randn(57344, generator=generator)).double()
    assert quantised.scales is not None
    exact = kind.dequantise(quantised).double()
    held = torch.tensor(decode.numbers("nf4")).half().double() / decode.stretch("nf4")
    scales = quantised.scales.double().repeat_interleave(64, dim=1)
    found = held[quantised.codes.long()] * scales @ x
    assert float((found - exact @ x).norm() / (exact @ x).norm()) < 3e-4


def test_formats_of_other_widths_have_none() -> None:
    for spec in ("int1", "int2"):
        assert decode.unpack_ptx(spec, True) == decode.dot_ptx(spec, True) == ""
