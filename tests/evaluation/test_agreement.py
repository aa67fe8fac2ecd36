"""Correlations of guessed with true counterfactuals, and the test between two ways of guessing."""

import re

import numpy as np
import pytest
import scipy.stats
import torch

from pyattr.evaluation import agreement, compare


def test_a_case_worked_by_hand():
    image = np.array([[1.0, 1.0, 1.0]])
    true = np.array([[[2.0, 1.0, 0.0], [1.0, 1.0, 3.0], [1.5, 1.0, 1.0]]])  # changes (1, 0, -1), (0, 0, 2), (.5, 0, 0)
    guessed = np.array([[[4.0, 1.0, -2.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])  # (3, 0, -3), (0, 0, -1), 0
    found = agreement(image, true, guessed)
    np.testing.assert_allclose(found.pearson, [[1.0, -1.0, np.nan]], rtol=1e-14)
    # Sizes: true 1.41, 2, 0.5; guessed 4.24, 1, 0: ranks (2, 3, 1) and (3, 2, 1).
    np.testing.assert_allclose(found.spearman, [0.5], rtol=1e-14)


def test_scipy_agrees_on_images():
    rng = np.random.default_rng(0)
    image, true = rng.standard_normal((3, 1, 4, 4)), rng.standard_normal((3, 5, 1, 4, 4))
    guessed = true + rng.standard_normal(true.shape)
    found = agreement(torch.from_numpy(image), torch.from_numpy(true), torch.from_numpy(guessed).float())
    for q in range(3):
        changes = [(x[q] - image[q]).reshape(5, -1) for x in (true, guessed.astype(np.float32))]
        for m in range(5):
            wanted = scipy.stats.pearsonr(*(c[m] for c in changes)).statistic
            assert found.pearson[q, m] == pytest.approx(wanted, rel=1e-6)
        sizes = [np.linalg.norm(c, axis=1) for c in changes]
        assert found.spearman[q] == pytest.approx(scipy.stats.spearmanr(*sizes).statistic, rel=1e-12)


def test_equal_sizes_and_shifts_have_no_correlation():
    image = np.zeros((1, 3))
    true = np.array([[[0.1, 0.1, 0.1], [0.0, 0.0, 0.5]]])  # the first change is one shade for all pixels
    found = agreement(image, true, np.ones((1, 2, 3)) * 0.3)
    assert np.isnan(found.pearson).all()
    assert np.isnan(found.spearman).all()


def test_compare():
    found = compare([3.0, 4.0, 5.0, np.nan], [[1.0, 2.0], [3.0, np.nan]], alternative="greater")
    assert found.counts == (3, 3)
    assert found.statistic == 8.5  # of nine pairs eight are won and one is a tie
    assert found.effect == pytest.approx(8.5 / 9)
    wanted = scipy.stats.mannwhitneyu([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], alternative="greater")
    assert found.p_value == wanted.pvalue
    assert compare([1.0, 2.0], [1.0, 2.0]).p_value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: agreement(np.zeros((2, 3)), np.zeros((2, 4, 5)), np.zeros((2, 4, 5))),
            "agreement: true must have shape [Q, M, ...] for images [Q, ...] of shape [2, 3], got [2, 4, 5]",
        ),
        (
            lambda: agreement(np.zeros((2, 3)), np.zeros((2, 4, 3)), np.zeros((2, 5, 3))),
            "agreement: guessed must have the shape of true, [2, 4, 3], got [2, 5, 3]",
        ),
        (lambda: compare([np.nan], [1.0]), "compare: first must hold at least one number that is not NaN, got none"),
        (lambda: compare([1.0], [1.0], alternative="less"),
         "compare: alternative must be two-sided or greater, got 'less'"),
    ],
)  # fmt: skip
def test_refusals(call, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        call()
