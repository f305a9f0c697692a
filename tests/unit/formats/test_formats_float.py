"""Floating-point formats against ml_dtypes, and block scaling against a plain twin of the text."""

from __future__ import annotations

import bisect

import ml_dtypes
import numpy as np
import pytest
import torch

from memladder import formats
from memladder.core.errors import FormatError
from memladder.formats._shared import mx
from memladder.formats._shared.elements import ELEMENTS
from tests.unit.code_tables import BYTES, E2M1, E4M3, E5M2

# Micikevicius et al. 2022, table 1, and OCP MX v1.0, sections 5.3.1 and 5.3.3: the type, its
# largest number, and the exponent of its largest power of two.
FP8 = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
MX = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 6.0, 2),
    "mxfp8": (ml_dtypes.float8_e4m3fn, 448.0, 8),
    "mxfp8:element=e5m2": (ml_dtypes.float8_e5m2, 57344.0, 15),
}


def encoded(values: np.ndarray, dtype: type, top: float) -> np.ndarray:
    """ml_dtypes' codes of values that saturate."""
    return np.clip(values, -top, top).astype(dtype).view(np.uint8)


def around_middles(numbers: np.ndarray) -> np.ndarray:
    """Numbers of a type, the middles between neighbours, and what lies just beside both."""
    numbers = np.unique(numbers[np.isfinite(numbers)])
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
    values = values.astype(np.float32)
    return np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)])


def across_exponents(count: int) -> np.ndarray:
    """float32 of all magnitudes, subnormal to largest, both signs."""
    random = np.random.default_rng(count)
    bits = random.integers(0x7F80_0000, size=count, dtype=np.uint32)
    return (bits | random.integers(2, size=count, dtype=np.uint32) << 31).view(np.float32)


def test_fp16_is_float16() -> None:
    kind = formats.get("fp16")
    values = across_exponents(5000)
    values = values[np.abs(values) < 65520].reshape(1, -1)
    found = kind.quantise(torch.from_numpy(values))
    assert found.scales is None
    assert found.codes.dtype == torch.int16
    assert found.codes.numpy().tobytes() == values.astype(np.float16).tobytes()
    np.testing.assert_array_equal(kind.dequantise(found), values.astype(np.float16))


def test_fp16_refuses_what_it_cannot_hold() -> None:
    kind = formats.get("fp16")
    # 65520 is the middle between the largest number and the next, which would be 65536.
    kind.quantise(torch.tensor([[np.nextafter(np.float32(65520), np.float32(0))]]))
    for value in (65520.0, -1e6):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(FormatError, match=r"^a value beyond 65504 does not fit into fp16$"):
                kind.quantise(torch.tensor([[1.0, value]], dtype=dtype))


@pytest.mark.parametrize("element", FP8)
def test_all_fp8_codes_are_decoded(element: str) -> None:
    expected = BYTES.view(FP8[element][0]).astype(np.float32)
    found = ELEMENTS[element].decode(torch.from_numpy(BYTES)).numpy()
    number = ~np.isnan(expected)
    assert number.sum() == {"e4m3": 254, "e5m2": 250}[element]
    assert found[number].tobytes() == expected[number].tobytes()
    # What else a NaN holds is the library's affair.
    assert np.isnan(found[~number]).all()
    assert np.array_equal(np.signbit(found), BYTES >= 128)


@pytest.mark.parametrize("element", FP8)
def test_all_float16_values_are_encoded(element: str) -> None:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    found = ELEMENTS[element].encode(torch.from_numpy(values)).numpy()
    nan = np.isnan(values)
    assert nan.sum() == 2046
    assert np.array_equal(found[~nan], encoded(values[~nan], *FP8[element]))
    assert np.isnan(found[nan].view(FP8[element][0]).astype(np.float32)).all()


@pytest.mark.parametrize("element", FP8)
def test_float32_values_are_encoded(element: str) -> None:
    dtype, top = FP8[element]
    numbers = BYTES.view(dtype).astype(np.float32)
    ends = np.array([0.0, -0.0, top * 1.1, -top * 1.1, 1e9, -3e38, np.inf, -np.inf], np.float32)
    values = np.concatenate([around_middles(numbers), across_exponents(200_000), ends])
    found = ELEMENTS[element].encode(torch.from_numpy(values)).numpy()
    assert np.array_equal(found, encoded(values, dtype, top))
    # Saturation, without ml_dtypes.
    top_code = {"e4m3": 0x7E, "e5m2": 0x7B}[element]
    assert found[-8:].tolist() == [0, 0x80, *([top_code, top_code | 0x80] * 3)]


@pytest.mark.parametrize("element", FP8)
def test_ties_go_to_the_even_code(element: str) -> None:
    numbers = BYTES[:128].view(FP8[element][0]).astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    found = ELEMENTS[element].encode(torch.from_numpy(middles)).numpy()
    lower = np.arange(len(middles))
    assert np.array_equal(found, lower + lower % 2)


def rows(shape: tuple[int, int]) -> np.ndarray:
    """Rows of very different magnitudes, one of them zero."""
    random = np.random.default_rng(shape)
    values = random.standard_normal(shape) * 10.0 ** random.uniform(-4, 3, (shape[0], 1))
    values[3] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("element", FP8)
@pytest.mark.parametrize("scale", ["float32", "float16"])
def test_fp8_scales_a_rows_absmax_to_the_largest_number(element: str, scale: str) -> None:
    dtype, top = FP8[element]
    values = rows((23, 333))
    found = formats.get(f"fp8:element={element},scale={scale}").quantise(torch.from_numpy(values))
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(top)
    scales[3] = 1
    scales = scales.astype(scale)
    assert found.scales is not None
    assert found.scales.numpy().dtype == scale
    assert np.array_equal(found.scales.numpy(), scales)
    # A float16 scale can vanish: the row then is one of zeros. So is, of course, the fourth.
    gone = (scales == 0)[:, 0]
    assert gone.any() == (scale == "float16" and element == "e5m2")
    codes = found.codes.numpy()
    whole = values[~gone] / scales[~gone].astype(np.float32)
    assert np.array_equal(codes[~gone], encoded(whole, dtype, top))
    assert not (codes[gone] & 0x7F).any()
    assert not codes[3].any()


def test_e8m0_is_a_power_of_two() -> None:
    found = mx.scale_values(torch.from_numpy(BYTES)).numpy()
    expected = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    # OCP MX v1.0, table 7.
    assert found[[0, 1, 127, 128, 254]].tolist() == [2.0**-127, 2.0**-126, 1, 2, 2.0**127]
    assert np.flatnonzero(np.isnan(found)).tolist() == [255]


def test_all_mxfp4_codes_are_decoded() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    found = formats.get("mxfp4").decode(codes).numpy()
    assert found.tobytes() == E2M1.tobytes()
    # OCP MX v1.0, table 5: S00M is 0 or 0.5, the others 2^(E−1) · (1 + M/2).
    assert found[0].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("spec", MX)
def test_elements_of_a_block_are_rounded_and_saturate(spec: str) -> None:
    dtype, top, exponent = MX[spec]
    numbers = {"mxfp4": E2M1, "mxfp8": E4M3, "mxfp8:element=e5m2": E5M2}[spec]
    # The scale stays 1 while the absmax is below twice the largest power of two.
    limit = np.float32(2.0 ** (exponent + 1))
    below = np.nextafter(limit, np.float32(0))
    random = np.random.default_rng(1).uniform(-limit, limit, 5000).astype(np.float32)
    values = np.concatenate([around_middles(numbers), random, [below, -below]])
    values = values.astype(np.float32)
    assert np.abs(values).max() < limit
    blocks = np.zeros((len(values), 32), np.float32)
    blocks[:, 0] = top
    blocks[:, 31] = values
    kind = formats.get(spec)
    found = kind.quantise(torch.from_numpy(blocks))
    assert found.scales is not None
    assert found.scales.unique().tolist() == [127]
    assert np.array_equal(found.codes.numpy()[:, 31], encoded(values, dtype, top))
    assert kind.dequantise(found)[-2:, 31].tolist() == [top, -top]


POWERS = [2.0**n for n in range(-149, 128)]


def block_twin(block: np.ndarray, spec: str) -> tuple[np.ndarray, int]:
    """OCP MX v1.0, section 6.3, for one block: its elements' codes and its E8M0 scale."""
    dtype, top, exponent = MX[spec]
    most = float(np.abs(block).max())
    # The largest power of two not above the absmax, by looking for it.
    shared = bisect.bisect_right(POWERS, most) - 1 - 149 - exponent if most else -127
    shared = min(max(shared, -127), 127)
    return encoded(block.astype(np.float64) / 2.0**shared, dtype, top), shared + 127


@pytest.mark.parametrize("spec", MX)
@pytest.mark.parametrize("columns", [1, 31, 77, 320])
@pytest.mark.parametrize("magnitudes", ["near", "far", "any"])
def test_blocks_are_quantised_as_the_specification_says(
    spec: str, columns: int, magnitudes: str
) -> None:
    random = np.random.default_rng(columns)
    if magnitudes == "any":
        values = across_exponents(9 * columns).reshape(9, columns)
    else:
        # One magnitude a row: of weights, or from subnormal numbers to the largest.
        far = np.linspace(-149, 124, 9)
        powers = far if magnitudes == "far" else np.full(9, -6.5)
        values = (random.standard_normal((9, columns)) * 2.0 ** powers[:, None]).astype(np.float32)
    values[4] = 0
    values[5, columns // 2] = 2.0**-3  # a power of two, perhaps the absmax
    found = formats.get(spec).quantise(torch.from_numpy(values))
    assert found.scales is not None
    assert found.scales.shape == (9, -(-columns // 32))
    for row in range(9):
        for block in range(found.scales.shape[1]):
            part = slice(32 * block, 32 * block + 32)
            codes, scale = block_twin(values[row, part], spec)
            assert found.scales[row, block] == scale
            assert np.array_equal(found.codes[row, part].numpy(), codes)


@pytest.mark.parametrize("spec", MX)
def test_shared_exponents_at_their_limits(spec: str) -> None:
    exponent = MX[spec][2]
    largest = float(np.finfo(np.float32).max)
    cases = {
        0.0: 0,
        2.0**-149: 0,
        # The last that is clamped, and the first that is not.
        2.0 ** (exponent - 127): 0,
        2.0 ** (exponent - 126): 1,
        float(np.nextafter(np.float32(1), np.float32(0))): 126 - exponent,
        1.0: 127 - exponent,
        largest: 254 - exponent,
    }
    blocks = torch.zeros(len(cases), 32)
    blocks[:, 7] = -torch.tensor(list(cases))
    found = formats.get(spec).quantise(blocks)
    assert found.scales is not None
    assert found.scales[:, 0].tolist() == list(cases.values())
    assert not (found.codes[0] & 0x7 if spec == "mxfp4" else found.codes[0] & 0x7F).any()


@pytest.mark.parametrize("spec", MX)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_block_with_nan_is_nan_and_its_neighbours_are_not(spec: str, bad: float) -> None:
    kind = formats.get(spec)
    values = torch.ones(2, 80)
    values[1, 40] = bad
    found = kind.quantise(values)
    assert found.scales is not None
    one = 127 - MX[spec][2]
    assert found.scales.tolist() == [[one] * 3, [one, 255, one]]
    # Codes of more bits would spill over into their neighbours when they are packed.
    assert int(found.codes.max()) < 1 << kind.bits
    nan = kind.dequantise(found).isnan()
    assert nan[1, 32:64].all()
    assert nan.sum() == 32
