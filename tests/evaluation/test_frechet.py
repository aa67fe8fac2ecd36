"""The Fréchet distance against closed forms."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given

from pyattr.evaluation import frechet_distance


def test_a_case_worked_by_hand():
    # Means 1 and 4; variances ((0 - 1)^2 + (2 - 1)^2) / 1 = 2 and 8: 9 + (sqrt 8 - sqrt 2)^2 = 11.
    assert frechet_distance([[0.0], [2.0]], [[2.0], [6.0]]) == pytest.approx(11.0, rel=1e-14)


def with_moments(mean, covariance, rng):
    """Features whose mean and covariance are these."""
    count = 3 * len(mean)
    x = rng.standard_normal((count, len(mean)))
    x = scipy.linalg.qr(x - x.mean(0), mode="economic")[0] * np.sqrt(count - 1)
    return mean + x @ scipy.linalg.cholesky(covariance)


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(0)
    m1, m2 = rng.standard_normal((2, 5))
    s1, s2 = np.array([1e-8, 1e-3, 1, 2, 1e4]), np.array([1e-4, 1e-3, 3, 0.5, 4e4])
    found = frechet_distance(with_moments(m1, np.diag(s1), rng), with_moments(m2, np.diag(s2), rng))
    assert found == pytest.approx(np.square(m1 - m2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum(), rel=1e-12)


def test_any_gaussians_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((2, 6, 6))
    s1, s2 = (f @ f.T + np.eye(6) for f in factors)
    m1, m2 = rng.standard_normal((2, 6))
    wanted = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    found = frechet_distance(with_moments(m1, s1, rng), torch.from_numpy(with_moments(m2, s2, rng)))
    assert found == pytest.approx(wanted, rel=1e-10)


def test_fewer_features_than_dimensions_lose_no_digits():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, 40)) * 1e3
    assert frechet_distance(x, x) <= 1e-13 * 40 * 1e6
    shift = rng.standard_normal(40)
    # A square root of each eigenvalue's rounding would leave an error of 1e-8 times the variances.
    assert frechet_distance(x, x + shift) == pytest.approx(np.square(shift).sum(), rel=1e-7)


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(2, 9), st.integers(1, 6))
def test_it_is_a_distance_that_rotations_keep(seed, n, m, d):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + 1
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    found = frechet_distance(x, y)
    assert found >= 0
    assert frechet_distance(y, x) == pytest.approx(found, rel=1e-9, abs=1e-12)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(found, rel=1e-9, abs=1e-12)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * found, rel=1e-9, abs=1e-12)
    assert frechet_distance(x, x[rng.permutation(n)]) <= 1e-12 * d * n


def test_nan_stays():
    assert np.isnan(frechet_distance([[0.0], [np.nan]], [[1.0], [2.0]]))
    assert np.isnan(frechet_distance([[0.0], [1.0]], [[np.inf], [2.0]]))


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (np.zeros(3), np.zeros((3, 1)), "frechet_distance: first must have shape [N, D], got [3]"),
        (np.zeros((3, 1)), np.zeros((3, 2)), "frechet_distance: second must have as many columns as first, 1, got 2"),
        (np.zeros((3, 1)), np.zeros((1, 1)), "frechet_distance: second must have at least 2 rows, got 1"),
    ],
)
def test_refusals(first, second, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        frechet_distance(first, second)
