"""Medians, their intervals, and comparisons of methods query by query."""

import numpy as np
import pytest
import scipy.stats
import torch

from pyattr.evaluation import Counterfactuals, Effects
from pyattr.evaluation.removal import random_scores, strongest


def effects(values, methods=("one", "random"), counts=(3,)):
    return Effects("L2", methods, counts, np.asarray(values, np.float64))


def test_medians_by_hand():
    found = effects([[[1, 9, 2, 4]], [[1, 1, 1, 3]]])
    assert found.median("one") == 3 and found.median("random", 3) == 1
    compared = found.compare("one")
    assert compared.effect == (0.5 + 1 + 1 + 1) / 4 and compared.difference == 1 and compared.count == 4
    assert np.isnan(effects([[[1, np.nan, 2]], [[1, 2, 3]]]).median("one"))


def test_intervals_are_percentiles_of_resampled_medians():
    values = np.random.default_rng(0).exponential(size=40)
    found = effects([[values], [values]]).interval("one")
    wanted = scipy.stats.bootstrap((values,), np.median, method="percentile", n_resamples=20_000, rng=1)
    np.testing.assert_allclose(found, wanted.confidence_interval, atol=0.06)
    assert found.low <= np.median(values) <= found.high
    assert effects([[[5.0]], [[1.0]]]).interval("one") == (5, 5)
    assert found == effects([[values], [values]]).interval("random")


def test_intervals_cover_the_median():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = effects([[rng.standard_normal(25)], [np.zeros(25)]]).interval("one")
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_refusals():
    found = effects(np.zeros((2, 2, 4)), counts=(1, 2))
    with pytest.raises(ValueError, match="Effects: method must be one of one, random, got 'two'"):
        found.median("two")
    with pytest.raises(ValueError, match="Effects: count must be one of 1, 2, got None"):
        found.median("one")
    with pytest.raises(ValueError, match="Effects: count must be one of 1, 2, got 3"):
        found.median("one", 3)


def test_measures_of_known_images():
    originals = torch.zeros(1, 1, 1, 2)
    images = torch.tensor([[0.3, 0.4], [-1.0, 0.0]]).reshape(2, 1, 1, 1, 1, 2)
    losses = torch.tensor([[[[1.0], [3.0]]], [[[2.0], [0.0]]]], dtype=torch.float64).reshape(2, 1, 1, 2, 1)
    found = Counterfactuals(
        ("one", "random"), (1,), torch.tensor([7]), originals, images, ("simple",),
        torch.tensor([[[0.5], [1.0]]], dtype=torch.float64), losses, torch.zeros(2, 1, 1, 4, dtype=torch.bool), 2, {},
    )  # fmt: skip
    np.testing.assert_allclose(found.l2.values[:, 0, 0], [0.5, 1])
    np.testing.assert_allclose(found.loss_change().values[:, 0, 0], [1.25, 0.25])
    with pytest.raises(ValueError, match="Counterfactuals: target must be one of simple, got 'elbo'"):
        found.loss_change("elbo")


def test_order_of_scores():
    scores = np.array([[1.0, 3, 3, -np.inf, np.inf], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(strongest(scores, 4), [[4, 1, 2, 0], [0, 1, 2, 3]])


def test_random_scores_are_uniform_and_independent():
    drawn = random_scores(np.array([0, 1, 2**62]), 4000, 0)
    assert scipy.stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(3, 1)]).max() < 0.1
    np.testing.assert_array_equal(random_scores(np.array([1]), 4000, 0)[0], drawn[1])
    assert not np.array_equal(random_scores(np.array([1]), 4000, 1)[0], drawn[1])
