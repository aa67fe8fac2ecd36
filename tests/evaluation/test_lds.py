"""The linear datamodeling score against scipy's correlation and bootstrap, and its interval by simulation."""

import sys

import hypothesis
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import strategies as st

from pyattr.evaluation import LDS, lds, lds_difference


def problem(seed, subsets=12, images=10, queries=5, noise=2.0):
    """Half subsets of images, the scores that make the outputs, and outputs with noise."""
    rng = np.random.default_rng(seed)
    masks = np.argsort(rng.random((subsets, images)), axis=1) < images // 2
    scores = rng.standard_normal((queries, images))
    return scores, masks, -(masks @ scores.T) + noise * rng.standard_normal((subsets, queries))


def by_scipy(scores, masks, outputs, rows=slice(None)):
    """[Q], one query at a time."""
    predicted = (masks.astype(float) @ scores.T)[rows]
    with np.errstate(invalid="ignore"):
        return np.array(
            [scipy.stats.spearmanr(predicted[:, q], -outputs[rows, q]).statistic for q in range(len(scores))]
        )


def test_a_score_worked_by_hand():
    masks = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    scores = [[3.0, 1.0, 2.0], [0.0, 0.0, 1.0]]
    # Query 0: predictions 3, 1, 2, 4; losses fall in the order 2, 0, 1, 3 of the subsets but for two neighbours.
    # Query 1: predictions 0, 0, 1, 0, ranks 2, 2, 4, 2; losses put the third subset last.
    outputs = [[2.0, 1.0], [5.0, 2.0], [1.0, 4.0], [0.0, 3.0]]
    found = lds(scores, masks, outputs)
    # Ranks of -outputs: 2, 1, 3, 4 against 3, 1, 2, 4: 1 - 6 * 2 / (4 * 15); then 4, 3, 1, 2 against 2, 2, 4, 2.
    np.testing.assert_allclose(found.per_query, [0.8, -3 / np.sqrt(15)], rtol=1e-12)
    assert found.mean == pytest.approx((0.8 + found.per_query[1]) / 2)
    assert found.per_query.dtype == np.float64 and found.num_subsets == 4


@hypothesis.given(st.integers(3, 9), st.integers(1, 6), st.integers(0, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_scipys_correlation_with_ties(subsets, images, queries, values, seed):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2, (subsets, images))
    scores = rng.integers(-values, values + 1, (queries, images)).astype(float)
    outputs = rng.integers(0, values + 1, (subsets, queries)).astype(float)
    found = lds(scores, masks, outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # scipy's, of constant input
        expected = by_scipy(scores, masks, outputs)
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12, equal_nan=True)
    np.testing.assert_equal(found.mean, np.mean(found.per_query) if queries else np.nan)


def test_the_published_resampling_is_scipys():
    scores, masks, outputs = problem(3, subsets=16)
    found = lds(scores, masks, outputs)

    def statistic(subsets):
        return by_scipy(scores, masks, outputs, np.asarray(subsets)).mean()

    theirs = scipy.stats.bootstrap(
        (range(16),), statistic, n_resamples=64, random_state=42, vectorized=False
    ).bootstrap_distribution
    np.testing.assert_allclose(found.bootstrap, theirs, atol=1e-12)
    assert found.bootstrap_mean == pytest.approx(theirs.mean()) and found.bootstrap_std == pytest.approx(theirs.std())
    assert found.bootstrap.shape == (64,)
    low, high = found.bootstrap_interval
    np.testing.assert_allclose([low, high], np.percentile(found.resample(1000), [2.5, 97.5]))


def test_the_jackknife_leaves_one_subset_out():
    scores, masks, outputs = problem(4, subsets=9)
    found = lds(scores, masks, outputs, level=0.8)
    without = [by_scipy(scores, np.delete(masks, m, 0), np.delete(outputs, m, 0)).mean() for m in range(9)]
    error = np.sqrt(8 / 9 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.standard_error == pytest.approx(error)
    assert found.interval == pytest.approx(
        (found.mean - scipy.stats.t(8).ppf(0.9) * error, found.mean + scipy.stats.t(8).ppf(0.9) * error)
    )


def test_blocks_change_nothing(monkeypatch):
    scores, masks, outputs = problem(5, queries=7)
    whole = lds(scores, masks, outputs)
    whole_numbers = whole.per_query, whole.bootstrap, whole.interval
    monkeypatch.setattr(sys.modules[lds.__module__], "_BLOCK", 30)
    parts = lds(scores, masks, outputs)
    for part, other in zip((parts.per_query, parts.bootstrap, parts.interval), whole_numbers, strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-13)


def test_resampling_pulls_towards_zero_and_the_interval_covers_what_it_says():
    images, queries, subsets = 20, 4, 24
    rng = np.random.default_rng(7)
    true, guess = rng.standard_normal((2, queries, images))
    guess = true + 1.5 * guess
    shared = rng.standard_normal((1, queries))

    def draw(count):
        masks = np.argsort(rng.random((count, images)), axis=1) < images // 2
        # Noise that the queries of one model share, as a model that is better on the whole makes it.
        noise = rng.standard_normal((count, queries)) + 2 * rng.standard_normal((count, 1)) * (1 + shared)
        return masks, -(masks @ true.T) + noise

    truth = lds(guess, *draw(40_000)).mean
    found = [lds(guess, *draw(subsets)) for _ in range(400)]
    covered = np.mean([one.interval.low <= truth <= one.interval.high for one in found])
    assert 0.925 < covered < 0.985  # 0.95 -+ 0.011, one standard deviation
    assert np.mean([one.standard_error for one in found]) == pytest.approx(np.std([one.mean for one in found]), rel=0.1)
    assert np.mean([one.mean for one in found]) == pytest.approx(truth, rel=0.1)
    assert np.mean([one.bootstrap_mean / one.mean for one in found if one.mean > 0.2]) < 0.99


def test_a_difference_is_paired():
    scores, masks, outputs = problem(8, subsets=40, queries=6)
    other = scores + 0.3 * np.random.default_rng(9).standard_normal(scores.shape)
    found = lds_difference(scores, other, masks, outputs)
    one, two = lds(scores, masks, outputs), lds(other, masks, outputs)
    np.testing.assert_array_equal(found.per_query, one.per_query - two.per_query)
    np.testing.assert_allclose(found.bootstrap, one.bootstrap - two.bootstrap, atol=1e-15)
    assert found.mean == pytest.approx(one.mean - two.mean)
    assert found.first.mean == one.mean and found.second.mean == two.mean
    # Scores that are nearly alike go up and down together.
    assert found.standard_error < 0.5 * np.hypot(one.standard_error, two.standard_error)
    same = lds_difference(scores, scores, masks, outputs)
    assert (same.mean, same.interval) == (0, (0, 0))


def test_a_good_method_is_told_from_chance():
    scores, masks, outputs = problem(10, subsets=48, images=30, queries=20, noise=3.0)
    chance = np.random.default_rng(11).standard_normal(scores.shape)
    assert lds_difference(scores, chance, masks, outputs).interval.low > 0.2
    low, high = lds(chance, masks, outputs).interval
    assert low < 0 < high


def test_kinds_of_input():
    scores, masks, outputs = problem(12)
    expected = lds(scores.astype(np.float16), masks, outputs).per_query
    halves = torch.from_numpy(scores).half()
    found = lds(halves, torch.from_numpy(masks), torch.from_numpy(outputs).requires_grad_())
    np.testing.assert_array_equal(found.per_query, expected)
    rounded = torch.from_numpy(scores).bfloat16()
    np.testing.assert_array_equal(
        lds(rounded, masks, outputs).per_query, lds(rounded.double(), masks, outputs).per_query
    )
    turned = lds(np.asfortranarray(scores), masks[::-1][::-1], outputs.T.copy().T)
    np.testing.assert_array_equal(turned.per_query, lds(scores, masks, outputs).per_query)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_stays(value):
    scores, masks, outputs = problem(13)
    expected = lds(scores, masks, outputs).per_query
    scores[1, 3] = value
    outputs[2, 4] = np.nan
    found = lds(scores, masks, outputs)
    np.testing.assert_array_equal(np.isnan(found.per_query), [False, True, False, False, True])
    np.testing.assert_array_equal(found.per_query[[0, 2, 3]], expected[[0, 2, 3]])
    for number in (found.mean, found.bootstrap_mean, *found.interval, *found.bootstrap_interval):
        assert np.isnan(number)


def test_constant_predictions_and_outputs_have_no_correlation():
    scores, masks, outputs = problem(14)
    scores[0], outputs[:, 1] = 0, 0.25
    found = lds(scores, masks, outputs)
    np.testing.assert_array_equal(np.isnan(found.per_query), [True, True, False, False, False])
    assert np.isnan(found.mean)


def test_no_queries():
    found = lds(np.empty((0, 4)), np.eye(4), np.empty((4, 0)))
    assert found.per_query.shape == (0,) and np.isnan(found.mean) and np.isnan(found.interval).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": np.ones((2, 10))}, r"lds: masks must have shape \[M, N\] with M at least 3, got \[2, 10\]"),
        ({"masks": np.ones(10)}, r"lds: masks must have shape \[M, N\] with M at least 3, got \[10\]"),
        ({"masks": np.full((12, 10), 0.5)}, "lds: masks must be 0 or 1, got 0.5"),
        ({"masks": np.full((12, 10), np.nan)}, "lds: masks must be 0 or 1, got nan"),
        ({"outputs": np.ones((5, 12))}, r"lds: outputs must have shape \[M, Q\] with M = 12, got \[5, 12\]"),
        ({"scores": np.ones((10, 5))}, r"lds: scores must have shape \[Q, N\] = \[5, 10\], got \[10, 5\]"),
        ({"level": 95}, r"lds: level must lie in \(0, 1\), got 95"),
    ],
)
def test_refusals(change, message):
    scores, masks, outputs = problem(15)
    with pytest.raises(ValueError, match=message):
        lds(**{"scores": scores, "masks": masks, "outputs": outputs, **change})


def test_refusals_of_a_difference():
    scores, masks, outputs = problem(16)
    with pytest.raises(ValueError, match=r"lds_difference: second must have shape \[Q, N\] = \[5, 10\], got \[4, 10\]"):
        lds_difference(scores, scores[:4], masks, outputs)


@pytest.mark.parametrize("known", [False, True])
def test_parts_of_the_queries(known):
    scores, masks, outputs = problem(17, queries=7)
    whole = lds(scores, masks, outputs)
    if known:  # what was computed for all queries is used for some
        assert whole.standard_error > 0 and whole.bootstrap_std > 0
    rows = np.array([5, 0, 2])
    part, alone = whole.take(rows), lds(scores[rows], masks, outputs[:, rows])
    np.testing.assert_array_equal(part.per_query, alone.per_query)
    assert part.interval == pytest.approx(alone.interval) and part.bootstrap_std == pytest.approx(alone.bootstrap_std)
    assert part.bootstrap_interval == pytest.approx(alone.bootstrap_interval)
    other = lds(-scores[::-1], masks, outputs)
    difference = lds_difference(scores[rows], -scores[::-1][rows], masks, outputs[:, rows])
    assert part.minus(other.take(rows)).interval == pytest.approx(difference.interval)
    which = np.array([0, 1, 1, 0, 1, 0, 0])
    mixed = lds(np.where(which[:, None], -scores[::-1], scores), masks, outputs)
    gathered = LDS.gathered([whole.take(which == 0), other.take(which == 1)], which)
    np.testing.assert_array_equal(gathered.per_query, mixed.per_query)
    assert gathered.interval == pytest.approx(mixed.interval) and gathered.bootstrap_std == pytest.approx(
        mixed.bootstrap_std
    )


def test_blocks_smaller_than_a_query_change_nothing(monkeypatch):
    scores, masks, outputs = problem(18, subsets=90)
    expected = lds(scores, masks, outputs)
    numbers = expected.interval, expected.bootstrap
    monkeypatch.setattr(sys.modules[lds.__module__], "_BLOCK", 100)
    found = lds(scores, masks, outputs)
    assert found.interval == pytest.approx(numbers[0], rel=1e-12)
    np.testing.assert_allclose(found.bootstrap, numbers[1], rtol=1e-12)
