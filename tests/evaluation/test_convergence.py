"""Nested subsets, distances between their samples, and principal components."""

import itertools
import re

import numpy as np
import pytest
import torch

from pyattr.evaluation import convergence, nested_codes, pca


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_nested_codes_leave_one_member_more_each_time(n):
    codes = nested_codes(n, seed=3)
    left = [n - int(code).bit_count() for code in codes]
    assert left == list(range(1, n + 1))
    assert all(int(b) & ~int(a) == 0 for a, b in itertools.pairwise(codes))
    assert codes[-1] == 0 and codes.dtype == np.uint64
    np.testing.assert_array_equal(codes, nested_codes(n, seed=3))


def test_orders_differ_by_seed():
    assert len({nested_codes(7, seed=seed).tobytes() for seed in range(5)}) == 5


def test_distances_worked_by_hand():
    images = torch.tensor([[[[0.0, 0.0]], [[3.0, 0.0]], [[3.0, 4.0]]]])  # [1, 3, 1, 2]
    found = convergence(images)
    np.testing.assert_allclose(found.to_full, [[5, 4, 0]])
    np.testing.assert_allclose(found.successive, [[3, 4]])


def test_infinite_pixels_have_no_distance():
    found = convergence(np.array([[[0.0], [np.inf], [np.inf]]]))
    np.testing.assert_array_equal(found.to_full, [[np.inf, np.nan, np.nan]])
    np.testing.assert_array_equal(found.successive, [[np.inf, np.nan]])


def test_principal_components_of_a_line():
    t = np.array([-1.0, 0.0, 4.0])[:, None]
    features = np.array([5.0, 5.0, 1.0]) + t * np.array([0.0, -3.0, 4.0]) / 5
    found = pca(features, 1)
    np.testing.assert_allclose(found.directions, [[0, -0.6, 0.8]], atol=1e-14)
    np.testing.assert_allclose(found.explained, [1])
    np.testing.assert_allclose(found.project(features), t - 1, atol=1e-14)


def test_principal_components_diagonalise_the_covariance():
    x = np.random.default_rng(0).standard_normal((50, 6)) @ np.diag([9, 4, 3, 2, 1, 0.5])
    found = pca(torch.from_numpy(x), 6)
    projected = found.project(x)
    np.testing.assert_allclose(np.cov(projected.T), np.diag(projected.var(0, ddof=1)), atol=1e-10)
    np.testing.assert_allclose(found.explained, projected.var(0) / x.var(0).sum(), rtol=1e-12)
    assert (np.diff(found.explained) < 0).all()
    assert (np.take_along_axis(found.directions, np.abs(found.directions).argmax(1)[:, None], 1) > 0).all()


def test_no_samples_settle():
    found = convergence(np.zeros((0, 3, 2, 2)))
    assert (found.to_full.shape, found.successive.shape) == ((0, 3), (0, 2))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: nested_codes(65), "nested_codes: num_members must lie in [1, 64], got 65"),
        (lambda: nested_codes(2, seed=-1), "nested_codes: seed must lie in [0, 4294967295], got -1"),
        (lambda: convergence(np.zeros((2, 3))),
         "convergence: images must have shape [Q, S, ...] with S at least 1, got [2, 3]"),
        (lambda: nested_codes(2.5), "nested_codes: num_members must be an integer, got float"),
        (lambda: convergence(["a"]), "convergence: images has dtype <U1, which torch does not have"),
        (lambda: pca(np.zeros((3, 5)), 3), "pca: components must lie in [1, 2], got 3"),
        (lambda: pca(np.zeros((1, 5))), "pca: features must have at least 2 rows and a column, got shape [1, 5]"),
        (lambda: pca(np.array([[0.0, 1.0], [np.nan, 2.0]]), 1), "pca: features must be finite"),
        (lambda: pca(np.eye(3), 1).project(np.zeros((2, 4))), "project: features must have 3 columns, got 4"),
        (lambda: pca(np.ones((3, 5))), "pca: features must not all be equal"),
    ],
)  # fmt: skip
def test_refusals(call, told):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(told)}$"):
        call()
