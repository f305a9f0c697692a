"""Masks, ALiBi and rotary positions by their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from memladder.engine.frontend.positions import (
    PositionError,
    read_bias,
    read_rotation,
    still_masked,
)

S = 40
DISTANCE = np.arange(S)[:, np.newaxis] - np.arange(S)


def mask(seen: int, low: float = -np.inf) -> np.ndarray:
    return np.where((DISTANCE >= 0) & (seen > DISTANCE), 0.0, low)[np.newaxis]


@pytest.mark.parametrize("low", [-np.inf, -65504.0, np.finfo(np.float32).min])
def test_causal_masks_and_windows(low: float) -> None:
    found = read_bias(mask(S, low))
    assert (found.causal, found.window, found.slopes) == (True, None, None)
    found = read_bias(mask(7, low))
    assert (found.causal, found.window, found.slopes) == (True, 7, None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("form", ["by key", "by distance", "with the mask"])
def test_alibi_in_all_its_spellings(dtype: type, form: str) -> None:
    # Press et al. 2022: 2^-2, 2^-4, 2^-6, 2^-8 for four heads.
    slopes = 4.0 ** -np.arange(1, 5)
    by_key = slopes[:, np.newaxis, np.newaxis] * np.arange(S)
    added = {
        "by key": by_key,
        "by distance": -slopes[:, np.newaxis, np.newaxis] * DISTANCE,
        "with the mask": by_key + mask(S, -30000.0),
    }[form].astype(dtype)
    found = read_bias(added.astype(np.float32))
    assert found.slopes is not None
    assert found.slopes.tolist() == slopes.tolist()
    assert found.causal == (form == "with the mask")


def test_slopes_that_are_not_the_papers_are_kept() -> None:
    slopes = np.array([0.3, 0.01, 0.07])
    found = read_bias(slopes[:, np.newaxis, np.newaxis] * np.arange(S))
    np.testing.assert_allclose(found.slopes, slopes, rtol=1e-6)


def test_what_is_added_to_a_mask_may_undo_it() -> None:
    lines = 0.5 * np.arange(S).reshape(1, 1, S)
    assert still_masked([read_bias(mask(S, -1e4)), read_bias(lines)])
    for added in (1e4 * lines, np.where(DISTANCE >= 0, 0.0, 9999.0)[np.newaxis]):
        assert still_masked([read_bias(mask(S)), read_bias(added)])
        assert not still_masked([read_bias(mask(S, -1e4)), read_bias(added)])


def test_slopes_that_are_nearly_the_papers_are_kept() -> None:
    slopes = 1.003 * 4.0 ** -np.arange(1, 5)
    found = read_bias((slopes[:, np.newaxis, np.newaxis] * np.arange(S)).astype(np.float32))
    np.testing.assert_allclose(found.slopes, slopes, rtol=1e-6)


@pytest.mark.parametrize("low", [-np.inf, -1e9, -1e5, -1e4])
def test_a_mask_that_is_scaled_masks_or_is_refused(low: float) -> None:
    found = read_bias(mask(S, low)).times(0.25)
    assert (found.causal, found.floor) == (True, low / 4)
    for factor in (0.0, -1.0, 1e-3 if low > -1e6 else 1e-7 if low > -1e10 else -0.5):
        with pytest.raises(PositionError, match="a mask of"):
            read_bias(mask(S, low)).times(factor)


@pytest.mark.parametrize(
    "added",
    [
        np.where(DISTANCE <= 0, 0.0, -np.inf)[np.newaxis],
        np.where(DISTANCE % 2 == 0, 0.0, -np.inf)[np.newaxis],
        np.sqrt(np.arange(S, dtype=float)).reshape(1, 1, S),
        np.concatenate((mask(S), mask(3))),
        # A hundredth of the straight line's height.
        (-np.arange(S) - 0.01 * np.sqrt(np.arange(S))).reshape(1, 1, S),
    ],
    ids=["future", "holes", "curve", "heads", "bent"],
)
def test_other_numbers_are_refused(added: np.ndarray) -> None:
    with pytest.raises(PositionError):
        read_bias(added)


def rotation(
    frequencies: np.ndarray, pairs: np.ndarray, dim: int, dtype: type = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """indices and factors of a rotation of columns pairs[0] with pairs[1]."""
    angles = np.arange(300)[:, np.newaxis] * frequencies
    factors = np.zeros((2, 300, dim))
    factors[0] = 1
    indices = np.stack((np.arange(dim), np.arange(dim)))
    for one, other, sign in ((pairs[0], pairs[1], -1), (pairs[1], pairs[0], 1)):
        factors[0][:, one] = np.cos(angles)
        factors[1][:, one] = sign * np.sin(angles)
        indices[1][one] = other
    return indices, factors.astype(dtype).astype(np.float64)


HALVES = np.arange(16).reshape(2, 8)
NEIGHBOURS = np.arange(16).reshape(8, 2).T


@pytest.mark.parametrize("pairs", [HALVES, NEIGHBOURS], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6])
def test_frequencies_are_found_from_tables(pairs: np.ndarray, dtype: type, base: float) -> None:
    expected = base ** (-np.arange(8) / 8)
    found = read_rotation(*rotation(expected, pairs, 16, dtype))
    np.testing.assert_allclose(found.frequencies, expected, rtol=2e-7)
    assert found.order.tolist() == pairs.reshape(-1).tolist()
    assert found.scale == 1.0


@pytest.mark.parametrize("base", [9999.0, 10001.0, 10009.0, 500001.0, 1234567.0, 10000.5])
def test_a_base_is_the_tables_and_not_a_round_one_near_it(base: float) -> None:
    expected = base ** (-np.arange(8) / 8)
    for pairs in (HALVES, NEIGHBOURS):
        indices, factors = rotation(expected, pairs, 16, np.float32)
        found = read_rotation(indices, factors).frequencies.astype(np.float64)
        angles = np.arange(300)[:, np.newaxis] * (found - expected)
        # As near as float32 tables are to what they mean at position 300.
        assert np.abs(angles).max() < 2e-5


@pytest.mark.parametrize("digits", [8, 11])
def test_a_table_of_few_bits_has_the_round_base_that_fits_it(digits: int) -> None:
    expected = 10000.0 ** (-np.arange(8) / 8)
    indices, factors = rotation(expected, HALVES, 16)
    fraction, exponent = np.frexp(factors)
    rounded = np.ldexp(np.round(np.ldexp(fraction, digits)), exponent - digits)
    found = read_rotation(indices, rounded)
    np.testing.assert_allclose(found.frequencies, expected, rtol=2e-7)
    assert found.scale == 1.0


def test_frequencies_that_are_interpolated() -> None:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): some as they were, some for longer texts."""
    expected = 10000.0 ** (-np.arange(8) / 8) / np.linspace(1, 4, 8)
    indices, factors = rotation(expected, HALVES, 16, np.float32)
    found = read_rotation(indices, factors * 1.0009)
    assert found.scale == pytest.approx(1.0009, rel=1e-6)
    np.testing.assert_allclose(found.frequencies, expected, rtol=2e-6)


def test_positions_that_are_nearly_in_proportion_are_refused() -> None:
    places = np.arange(300.0) ** 1.0001
    angles = places[:, np.newaxis] * 10000.0 ** (-np.arange(8) / 8)
    indices, factors = rotation(np.zeros(8), HALVES, 16)
    factors[0] = np.tile(np.cos(angles), 2)
    factors[1] = np.concatenate((-np.sin(angles), np.sin(angles)), axis=1)
    with pytest.raises(PositionError, match="in proportion"):
        read_rotation(indices, factors)


def test_frequencies_of_no_series_are_as_exact_as_their_table() -> None:
    expected = np.array([1.0, 0.31, 0.02, 0.004, 0.0011, 3e-4, 2e-5, 1e-6])
    found = read_rotation(*rotation(expected, HALVES, 16, np.float32))
    np.testing.assert_allclose(found.frequencies, expected, rtol=1e-4, atol=1e-8)


def test_columns_that_are_not_rotated_have_frequency_zero() -> None:
    expected = 10000.0 ** (-np.arange(3) / 3)
    found = read_rotation(*rotation(expected, np.array([[0, 1, 2], [3, 4, 5]]), 10))
    np.testing.assert_allclose(found.frequencies, [*expected, 0, 0], rtol=1e-6)
    # Paired with i + 5: 0 with 3, 1 with 4, 2 with 5, and 6, 7 with 8, 9.
    assert found.order.tolist() == [0, 1, 2, 6, 7, 3, 4, 5, 8, 9]


def test_a_scaled_rotation() -> None:
    indices, factors = rotation(10000.0 ** (-np.arange(8) / 8), HALVES, 16)
    assert read_rotation(indices, factors * 1.25).scale == pytest.approx(1.25)


def test_what_is_no_rotation_is_refused() -> None:
    indices, factors = rotation(10000.0 ** (-np.arange(8) / 8), HALVES, 16)
    for wrong in (
        np.abs(factors),
        factors**2,
        factors[:, ::-1],
        factors[:, np.arange(300) ** 2 % 300],
    ):
        with pytest.raises(PositionError):
            read_rotation(indices, wrong)
