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
    """As float16, from the format itself."""
    decoded = formats.get(spec).decode(torch.tensor([codes], dtype=torch.uint8))
    return decoded[0].half().tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_a_word_becomes_its_eight_numbers(spec: str) -> None:
    interleaved = formats.get(spec).is_interleaved
    text = decode.unpack_ptx(spec, interleaved)
    for codes in rows_of_codes():
        found = ptx.run(text, {"$8": packed(codes, interleaved)})
        halves = [ptx.half(int(found[f"${i}"])) for i in range(8)]
        assert halves == numbers(spec, codes)


@pytest.mark.parametrize("spec", SPECS)
def test_a_word_times_eight_numbers(spec: str) -> None:
    interleaved = formats.get(spec).is_interleaved
    text = decode.dot_ptx(spec, interleaved)
    generator = np.random.default_rng(0)
    for codes in rows_of_codes():
        x = generator.standard_normal(8).astype(np.float16)
        units = x.view(np.uint32).tolist()
        operands = {"$1": packed(codes, interleaved)}
        operands |= {f"${2 + j}": unit for j, unit in enumerate(units)}
        if not interleaved:
            tables = decode.tables(spec)
            operands |= {f"${6 + j}": table % 2**32 for j, table in enumerate(tables)}
        found = ptx.run(text, operands)["$0"]
        terms = np.array(numbers(spec, codes)) * x.astype(np.float64)
        # Four roundings to float16 of partial sums.
        assert abs(found - terms.sum()) <= 4 * 2**-11 * np.abs(terms).sum()


def test_formats_of_other_widths_have_none() -> None:
    for spec in ("int1", "int2"):
        assert decode.unpack_ptx(spec, True) == decode.dot_ptx(spec, True) == ""
