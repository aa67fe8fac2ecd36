"""Correlations of guessed with true counterfactuals, and the test between two ways of guessing."""

import re

import numpy as np
import pytest
import scipy.stats
import torch

from pyattr.evaluation import agreement, compare, compare_paired


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


def test_compare_paired_worked_by_hand():
    # Medians 5, 1, 7, 4 and 2, 2, 2, 4: differences 3, -1, 5, 0. Of 1, 3, 5 the first set has the ranks 2 and 3.
    first = [[5.0, 4.0, 9.0], [1.0, np.nan, 1.0], [7.0, 7.0, 7.0], [3.0, 5.0, np.nan]]
    found = compare_paired(first, [2.0, 2.0, 2.0, 4.0])
    assert (found.statistic, found.count) == (5.0, 4)
    # Of the eight signs of three ranks, two give sums of at least 5, and two of at most 1.
    assert found.p_value == pytest.approx(4 / 8)
    assert compare_paired(first, [2.0, 2.0, 2.0, 4.0], alternative="greater").p_value == pytest.approx(2 / 8)
    other = compare_paired([2.0, 2.0, 2.0, 4.0], first, alternative="greater")
    assert (other.statistic, other.p_value) == (1.0, pytest.approx(7 / 8))
    assert (found.effect, other.effect) == (2.5 / 4, 1.5 / 4)
    assert (found.difference, other.difference) == (1.5, -1.5)


def test_numbers_of_one_unit_are_no_evidence_of_their_own():
    """A thousand counterfactuals of five samples are five units, however sure the pooled test is."""
    first = np.arange(5.0)[:, None] + np.linspace(0, 0.1, 1000)
    paired, pooled = (test(first + 1, first, alternative="greater") for test in (compare_paired, compare))
    assert paired.p_value == pytest.approx(2.0**-5) and paired.count == 5
    assert pooled.p_value < 1e-50


def test_compare_paired_without_differences_or_numbers():
    same = compare_paired([1.0, 2.0, np.inf], [1.0, 2.0, np.inf])
    assert (same.statistic, same.p_value, same.effect, same.difference, same.count) == (0.0, 1.0, 0.5, 0.0, 3)
    found = compare_paired([[np.nan, np.nan], [3.0, np.nan], [1.0, 1.0]], torch.tensor([1.0, 2.0, float("nan")]))
    assert (found.count, found.statistic, found.difference) == (1, 1.0, 1.0)


def test_infinite_changes_have_no_correlation_of_pixels():
    image, guessed = np.zeros((1, 3)), np.array([[[0.0, 0.1, 0.2], [0.3, 0.1, 0.1]]])
    found = agreement(image, np.array([[[np.inf, 0.0, 1.0], [3.0, 1.0, 1.0]]]), guessed)
    np.testing.assert_allclose(found.pearson, [[np.nan, 1.0]])
    assert np.isnan(agreement(image + np.inf, guessed + np.inf, guessed).pearson).all()


def test_no_samples_agree_in_nothing():
    found = agreement(np.zeros((0, 3)), np.zeros((0, 4, 3)), np.zeros((0, 4, 3)))
    assert found.pearson.shape == (0, 4) and found.spearman.shape == (0,)


def test_half_precision_and_graphs():
    rng = np.random.default_rng(0)
    image, true = torch.zeros(2, 5), torch.from_numpy(rng.integers(-8, 8, (2, 3, 5))).float()
    wanted = agreement(image, true, 2 * true + 1)
    found = agreement(image.bfloat16(), true.bfloat16().requires_grad_(), (2 * true + 1).half())
    np.testing.assert_array_equal(found.pearson, wanted.pearson)


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
        (
            lambda: agreement(np.zeros((2, 3)), np.zeros((2, 0, 3)), np.zeros((2, 0, 3))),
            "agreement: true must hold at least one counterfactual of at least one pixel, got shape [2, 0, 3]",
        ),
        (
            lambda: agreement(np.zeros((2, 0)), np.zeros((2, 4, 0)), np.zeros((2, 4, 0))),
            "agreement: true must hold at least one counterfactual of at least one pixel, got shape [2, 4, 0]",
        ),
        (lambda: agreement(np.zeros((2, 3)), np.zeros((2, 4, 3)) * 1j, 0), "agreement: true must be real numbers, got "
         "torch.complex128"),
        (lambda: agreement([torch.zeros(3)], 0, 0), "agreement: images must be one array, got a list of tensors: stack them"),
        (lambda: compare([[1.0], [1.0, 2.0]], [1.0]), "compare: first must be an array, got lists of different lengths"),
        (lambda: compare("1", [1.0]), "compare: first must be a torch tensor, NumPy array or CuPy array, got str"),
        (lambda: compare_paired([1.0], [1.0, 2.0]), "compare_paired: second must have as many units as first, 1, got 2"),
        (lambda: compare_paired(1.0, [1.0]), "compare_paired: first must have shape [Q, ...], got []"),
        (lambda: compare_paired([np.nan], [1.0]),
         "compare_paired: at least one unit must have a number in both sets, got none"),
        (lambda: compare_paired([], []), "compare_paired: at least one unit must have a number in both sets, got none"),
        (lambda: compare_paired([1.0], [1.0], alternative="less"),
         "compare_paired: alternative must be two-sided or greater, got 'less'"),
        (lambda: compare([np.nan], [1.0]), "compare: first must hold at least one number that is not NaN, got none"),
        (lambda: compare([1.0], [1.0], alternative="less"),
         "compare: alternative must be two-sided or greater, got 'less'"),
    ],
)  # fmt: skip
def test_refusals(call, told):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(told)}$"):
        call()
