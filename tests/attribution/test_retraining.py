"""Scores from pools of retrained models, against closed forms."""

import sys

import numpy as np
import pytest
import torch

from pyattr.attribution import Datamodel, EmpiricalInfluence
from pyattr.diffusion import Samples
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, lds, subsets
from pyattr.evaluation.ground_truth import image_hashes

IMAGES = torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 1, 2, 2)
QUERIES = 100 + torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)


def pool(masks, outputs, targets=("simple",)):
    """With one model of each subset and one draw of the noise."""
    masks, outputs = np.asarray(masks, bool), np.asarray(outputs, np.float64)
    outputs = outputs.reshape(len(targets), len(masks), 1, 1, -1)
    return GroundTruth(
        masks, outputs, targets, np.arange(3), data_hash(IMAGES), tuple(image_hashes(QUERIES)), settings={}
    )


def random_pool(subsets=20, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    masks = rng.random((subsets, 6)) < 0.5
    effects = rng.standard_normal((6, 3))
    return pool(masks, 5 - masks @ effects + noise * rng.standard_normal((subsets, 3))), effects


def test_empirical_influence_by_hand():
    masks = [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]]
    outputs = [[1.0, 0, 0], [2.0, 0, 6], [6.0, 3, 0]]
    method = EmpiricalInfluence(pool(masks, outputs)).fit(IMAGES)
    found = method.scores(QUERIES)
    assert found.dtype == torch.float32 and method.signed
    # Query 0: without image 0 its loss is 6, with it 1.5 on average.
    expected = [
        [4.5, -1.5, -3, -4.5, 3, 1.5],
        [3, -1.5, -1.5, -3, 1.5, 1.5],
        [-3, 6, -3, 3, 3, -6],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def ridge_by_hand(masks, outputs):
    """-coef of ridge regression with an intercept; the penalty by five folds of neighbours, from the normal equations."""

    def fit(x, y, alpha):
        mean = x.mean(0)
        x = x - mean
        coefficients = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        return coefficients, y.mean() - mean @ coefficients

    def explained(x, y, alpha):
        shares = []
        for test in np.array_split(np.arange(len(x)), 5):
            train = np.setdiff1d(np.arange(len(x)), test)
            w, b = fit(x[train], y[train], alpha)
            shares.append(1 - np.sum((y[test] - x[test] @ w - b) ** 2) / np.sum((y[test] - y[test].mean()) ** 2))
        return np.mean(shares)

    found = []
    for y in outputs.T:
        best = max((0.1, 1.0, 10.0), key=lambda alpha: explained(masks, y, alpha))
        found.append((-fit(masks, y, best)[0], best))
    return np.array([w for w, _ in found]), {best for _, best in found}


def test_datamodel_is_ridge_regression_with_the_penalty_that_predicts():
    chosen = set()
    for seed, noise in ((1, 0.05), (2, 1.0), (3, 4.0)):
        given, _ = random_pool(23, seed, noise)
        expected, penalties = ridge_by_hand(given.masks.astype(float), given.outputs())
        found = Datamodel(given).fit(IMAGES).scores(QUERIES)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
        chosen |= penalties
    assert len(chosen) > 1  # the choice was put to the test


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
def test_proponents_are_found_and_predict(method):
    given, effects = random_pool(400, 4)
    found = method(given).fit(IMAGES).scores(QUERIES)
    np.testing.assert_allclose(found.numpy(), effects.T, atol=0.25)
    # On subsets that the pool does not have.
    masks = subsets(6, 12)
    assert lds(found, masks, 5 - masks @ effects).mean > 0.95


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
def test_queries_may_be_some_in_any_order(method):
    made = method(random_pool()[0]).fit(IMAGES)
    every = made.scores(QUERIES)
    assert torch.equal(made.scores(QUERIES[[2, 0]]), every[[2, 0]])
    assert made.scores(QUERIES[:0]).shape == (0, 6)
    samples = Samples(QUERIES, torch.arange(3), QUERIES[:, None].float(), None, torch.arange(1), {})
    assert torch.equal(made.scores(samples), every)


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
def test_a_model_that_diverged_is_seen(method):
    given, _ = random_pool()
    expected = method(given).fit(IMAGES).scores(QUERIES)
    given.losses[0, 4, 0, 0, 1] = np.nan
    found = method(given).fit(IMAGES).scores(QUERIES)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])


def test_another_target():
    given, _ = random_pool()
    both = pool(given.masks, np.stack([given.outputs(), given.outputs()[::-1]]), ("simple", "elbo"))
    found = EmpiricalInfluence(both, target="elbo").fit(IMAGES).scores(QUERIES)
    assert torch.equal(found, EmpiricalInfluence(pool(given.masks, given.outputs()[::-1])).fit(IMAGES).scores(QUERIES))
    with pytest.raises(ValueError, match="GroundTruth: target must be one of simple, elbo, got 'l1'"):
        EmpiricalInfluence(both, target="l1")


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
def test_others_than_those_of_the_pool_are_refused(method):
    made, name = method(random_pool()[0]), method.__name__
    with pytest.raises(RuntimeError, match=f"{name}: fit must be called before scores"):
        made.scores(QUERIES)
    with pytest.raises(ValueError, match=f"{name}: train must be the 6 images of the ground truth, got 5"):
        made.fit(IMAGES[:5])
    with pytest.raises(
        ValueError, match=f"{name}: train must be the images of the ground truth, in their order and dtype, got o"
    ):
        made.fit(IMAGES.flip(0))
    made.fit(IMAGES)
    with pytest.raises(
        ValueError, match=f"{name}: queries must be among those of the ground truth, in their dtype; number 1 is"
    ):
        made.scores(torch.cat([QUERIES[:1], IMAGES[:1]]))


def test_small_pools_are_refused():
    masks = [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]]
    with pytest.raises(ValueError, match="got none without image 0"):
        EmpiricalInfluence(pool(masks, np.zeros((2, 3)))).fit(IMAGES)
    with pytest.raises(ValueError, match="pool must have models with and without each image, got none with image 3"):
        EmpiricalInfluence(pool([*masks, [0, 1, 0, 0, 1, 1]], np.zeros((3, 3)))).fit(IMAGES)
    given, _ = random_pool(9)
    with pytest.raises(ValueError, match="Datamodel: pool must hold at least 10 subsets, two for each fold, got 9"):
        Datamodel(given).fit(IMAGES)


def test_without_scikit_learn(monkeypatch):
    given, _ = random_pool()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"Datamodel: scikit-learn is missing: install pyattr\[evaluation\]"):
        Datamodel(given)
    EmpiricalInfluence(given).fit(IMAGES)
