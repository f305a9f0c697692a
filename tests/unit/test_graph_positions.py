"""Masks, ALiBi and rotary positions by their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from memladder.engine.frontend.positions import PositionError, read_bias, read_rotation

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


@pytest.mark.parametrize(
    "added",
    [
        np.where(DISTANCE <= 0, 0.0, -np.inf)[np.newaxis],
        np.where(DISTANCE % 2 == 0, 0.0, -np.inf)[np.newaxis],
        np.sqrt(np.arange(S, dtype=float)).reshape(1, 1, S),
        np.concatenate((mask(S), mask(3))),
    ],
    ids=["future", "holes", "curve", "heads"],
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
