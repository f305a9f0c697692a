"""Formats of evenly or normally spaced levels: int8, int4, int2, int1, nf4."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from memladder import formats
from memladder.formats._shared.base import Quantised
from memladder.formats.int2 import STEP
from memladder.formats.nf4 import CODE_BOOK
from tests.unit.code_tables import NORMAL_FLOAT

# Half the distance between neighbours, 2^-11 of the number: what rounding to float16 may change.
HALF_ULP = 2.0**-11


def weights(rows: int, columns: int) -> np.ndarray:
    """Rows of different magnitudes; the last is zero."""
    random = np.random.default_rng((rows, columns))
    values = random.standard_normal((rows, columns)) * 10.0 ** random.uniform(-2, 2, (rows, 1))
    values[-1] = 0
    return values.astype(np.float32)


def quantised(spec: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, Quantised]:
    """Codes, scales, and both."""
    found = formats.get(spec).quantise(torch.from_numpy(values))
    assert found.scales is not None
    assert found.codes.dtype == torch.uint8
    return found.codes.numpy(), found.scales.numpy(), found


def blocks(values: np.ndarray, size: int) -> list[tuple[int, slice, np.ndarray]]:
    """Each group's number, its columns, and its values [rows, up to size] in float64."""
    parts = [slice(start, start + size) for start in range(0, values.shape[1], size)]
    return [(i, part, values[:, part].astype(np.float64)) for i, part in enumerate(parts)]


def test_int8_is_absmax_over_127() -> None:
    values = weights(9, 333)
    codes, scales, found = quantised("int8", values)
    most = np.abs(values).max(axis=1, keepdims=True)
    expected = np.where(most == 0, 1, most / np.float32(127))
    assert np.array_equal(scales, expected)
    integers = np.rint(values / expected)
    assert np.array_equal(codes.view(np.int8), integers)
    # −128 is never used: the range is symmetric, and a row's extreme is exact.
    assert np.abs(integers).max(axis=1).tolist() == [127] * 8 + [0]
    error = np.abs(formats.get("int8").dequantise(found).numpy() - values)
    assert (error <= expected * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("size", [32, 128, 1024])
@pytest.mark.parametrize("columns", [1, 77, 128, 1500])
def test_int4_is_absmax_over_seven_and_a_half(size: int, columns: int) -> None:
    values = weights(9, columns)
    spec = f"int4:group_size={size}"
    codes, scales, found = quantised(spec, values)
    decoded = formats.get(spec).dequantise(found).numpy()
    assert scales.dtype == np.float16
    for group, part, block in blocks(values, size):
        scale = (np.abs(block).max(axis=1) / 7.5).astype(np.float16)
        scale[-1] = 1
        assert np.array_equal(scales[:, group], scale)
        steps = values[:, part] / scale[:, None].astype(np.float32)
        assert np.array_equal(codes[:, part], (np.rint(steps) + 8).clip(0, 15))
        # The group's extreme is 7.5 steps of a scale that was rounded.
        error = np.abs(decoded[:, part] - block) / scale[:, None]
        assert error.max() <= 0.5 + 7.5 * 1.001 * HALF_ULP
    assert (codes[-1] == 8).all()
    assert not decoded[-1].any()


@pytest.mark.parametrize("size", [32, 128, 1024])
@pytest.mark.parametrize("columns", [1, 77, 128, 1500])
@pytest.mark.parametrize("shift", [-9, -1, 0, 0.3, 9])
def test_int4_with_a_zero_point_holds_zero_and_the_range(
    size: int, columns: int, shift: float
) -> None:
    values = weights(9, columns)
    values += np.float32(shift) * values.std(axis=1, keepdims=True)
    # Zero in some rows only: it is in the range, too, where all values are on one side of it.
    values[::2, ::7] = 0
    spec = f"int4:group_size={size},zero_point=true"
    codes, scales, found = quantised(spec, values)
    decoded = formats.get(spec).dequantise(found).numpy()
    assert found.zeros is not None
    zeros = found.zeros.numpy()
    assert zeros.dtype == np.uint8
    assert zeros.shape == scales.shape == (9, -(-columns // size))
    for group, part, block in blocks(values, size):
        low, high = block.min(axis=1).clip(max=0), block.max(axis=1).clip(min=0)
        scale = ((high - low) / 15).astype(np.float16)
        scale[high == low] = 1
        # float32 differences may round otherwise than float64's, and so to a neighbour.
        np.testing.assert_allclose(scales[:, group], scale, rtol=2 * HALF_ULP)
        step = scales[:, group].astype(np.float64)
        assert (np.abs(zeros[:, group] + low / step) <= 0.5 + 15 * HALF_ULP).all()
        error = np.abs(decoded[:, part] - block) / step[:, None]
        assert error.max() <= 0.5 + 15 * 1.001 * HALF_ULP
    assert codes.max() <= 15
    assert not decoded[values == 0].any()


def test_int4_zero_points_by_hand() -> None:
    values = np.zeros((4, 32), np.float32)
    values[:, 1:4] = [[1, 2, 15], [-1, -2, -15], [-5, 10, 2.4], [-7, 8, 7.5]]
    codes, scales, found = quantised("int4:group_size=32,zero_point=true", values)
    assert found.zeros is not None
    assert scales[:, 0].tolist() == [1, 1, 1, 1]
    assert found.zeros[:, 0].tolist() == [0, 15, 5, 7]
    assert codes[:, :4].tolist() == [[0, 1, 2, 15], [15, 14, 13, 0], [5, 0, 15, 7], [7, 0, 15, 15]]


@pytest.mark.parametrize("columns", [1, 77, 128, 500])
def test_int2_is_the_nearest_of_four_levels(columns: int) -> None:
    values = weights(9, columns)
    codes, scales, _ = quantised("int2", values)
    for group, part, block in blocks(values, 128):
        # A shorter last group has the root mean square of what is in it.
        step = 0.9957 * np.sqrt(np.square(block).mean(axis=1))
        np.testing.assert_allclose(scales[:, group], step, rtol=1.01 * HALF_ULP)
        step = scales[:-1, group].astype(np.float64)
        levels = step[:, None] * [-1.5, -0.5, 0.5, 1.5]
        distances = np.abs(block[:-1, :, None] - levels[:, None, :])
        assert np.array_equal(codes[:-1, part], distances.argmin(axis=-1))
    assert not scales[-1].any()


def test_int2s_step_is_the_best_for_normal_values() -> None:
    normal = NormalDist()

    def distortion(step: float) -> float:
        """E (x − level)² of levels ±½, ±1½ steps with thresholds 0 and ±1 step."""
        inner, outer = step / 2, 3 * step / 2
        at_zero, at_step = normal.pdf(0), normal.pdf(step)
        beyond = 1 - normal.cdf(step)
        products = inner * (at_zero - at_step) + outer * at_step
        return 1 + 2 * (inner**2 * (0.5 - beyond) + outer**2 * beyond - 2 * products)

    assert STEP == 0.9957
    assert distortion(STEP) == pytest.approx(0.1188, abs=5e-5)
    # Flat at its lowest point: to the fourth digit there is no better one.
    assert distortion(STEP) < min(distortion(STEP - 5e-4), distortion(STEP + 5e-4))


def test_int1_is_the_sign_and_the_mean_magnitude() -> None:
    values = np.array([[0.5, -1.0, 0.0, -0.0, 2.5], [-3, -3, -3, 1, 5], [0] * 5], np.float32)
    codes, scales, found = quantised("int1", values)
    # Both zeros are positive.
    assert codes.tolist() == [[1, 0, 1, 1, 1], [0, 0, 0, 1, 1], [1] * 5]
    assert scales.tolist() == [[np.float16(0.8)], [3], [0]]
    assert formats.get("int1").dequantise(found)[1].tolist() == [-3, -3, -3, 3, 3]
    values = weights(9, 777)
    codes, scales, _ = quantised("int1", values)
    assert np.array_equal(codes, values >= 0)
    mean = np.abs(values, dtype=np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(scales, mean, rtol=1.01 * HALF_ULP)


def test_nf4s_numbers_are_the_papers() -> None:
    assert CODE_BOOK == NORMAL_FLOAT
    # As bitsandbytes' create_normal_map makes them: 8 quantiles above zero, 7 below, and zero.
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    numbers = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    np.testing.assert_allclose(CODE_BOOK, numbers, atol=2e-7)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("columns", [1, 77, 128, 500])
def test_nf4_is_the_nearest_number(size: int, columns: int) -> None:
    values = weights(9, columns)
    values[:, ::9] = 0
    spec = f"nf4:group_size={size}"
    codes, scales, found = quantised(spec, values)
    numbers = np.array(NORMAL_FLOAT)
    middles = (numbers[1:] + numbers[:-1]) / 2
    compared = 0
    for group, part, block in blocks(values, size):
        scale = np.abs(block).max(axis=1).astype(np.float16)
        assert np.array_equal(scales[:, group], scale)
        relative = block / np.where(scale == 0, 1, scale.astype(np.float64))[:, None]
        nearest = np.abs(relative[..., None] - numbers).argmin(axis=-1)
        clear = np.abs(relative[..., None] - middles).min(axis=-1) > 1e-6
        assert np.array_equal(codes[:, part][clear], nearest[clear])
        compared += clear.sum()
    assert compared > 0.99 * values.size
    # Zero is code 7, exactly.
    assert (codes[values == 0] == 7).all()
    assert not formats.get(spec).dequantise(found).numpy()[values == 0].any()


def test_nf4_keeps_a_blocks_extremes() -> None:
    values = np.zeros((1, 64), np.float32)
    values[0, :4] = [-0.375, 0.375, 0.374, -0.1]
    codes, _, found = quantised("nf4", values)
    assert codes[0, :5].tolist() == [0, 15, 15, 4, 7]
    decoded = formats.get("nf4").dequantise(found)[0, :5].tolist()
    assert decoded[:3] == [-0.375, 0.375, 0.375]
    assert math.isclose(decoded[3], 0.375 * -0.28444138169288635, rel_tol=1e-6)
    assert decoded[4] == 0
