"""A hyperparameter that is chosen on one half and reported on the other, against one that is tuned on the benchmark."""

import numpy as np
import pytest

from pyattr.evaluation import lds, tune_on_split, two_folds

# Three subsets of one image each: the order of the scores is the order of the predictions.
MASKS, OUTPUTS = np.eye(3), np.array([[3.0, 3, 3, 3], [2, 2, 2, 2], [1, 1, 1, 1]])  # the third is best for all queries
GOOD, BAD, HALF = [1.0, 2, 3], [3.0, 2, 1], [1.0, 3, 2]  # LDS 1, -1, 0.5


def noise(seed, subsets=16, images=12, queries=8, values=40, shared=False):
    """Scores that know nothing, and losses; ``shared``: all queries have one and the same scores, and the same losses."""
    rng = np.random.default_rng(seed)
    masks = np.argsort(rng.random((subsets, images)), axis=1) < images // 2
    outputs = rng.standard_normal((subsets, 1 if shared else queries)).repeat(queries if shared else 1, 1)
    rows = 1 if shared else queries
    return masks, outputs, [(v, rng.standard_normal((rows, images)).repeat(queries // rows, 0)) for v in range(values)]


def test_a_case_worked_by_hand():
    # "a" is good for queries 0 and 1, "b" for 2 and 3, and "c" is middling for all.
    grid = {"a": [GOOD, GOOD, BAD, BAD], "b": [BAD, BAD, GOOD, GOOD], "c": [HALF] * 4}
    found = tune_on_split(grid.items(), MASKS, OUTPUTS, folds=[0, 1, 1, 0])
    # Each fold has one query of either kind: a and b have mean 0 there, c 0.5.
    assert found.chosen == ("c", "c") and found.per_query.tolist() == pytest.approx([0.5] * 4)
    found = tune_on_split(grid.items(), MASKS, OUTPUTS, folds=[0, 0, 1, 1])
    # Fold 0 is reported by what is best on fold 1, and the other way round: the worst there is.
    assert found.chosen == ("b", "a") and found.per_query.tolist() == pytest.approx([-1] * 4)
    assert (found.mean, found.label) == (pytest.approx(-1), "tuned on other queries")
    assert found.curve == {"a": pytest.approx(0), "b": pytest.approx(0), "c": pytest.approx(0.5)}
    published = tune_on_split(grid.items(), MASKS, OUTPUTS, tune_on_benchmark=True)
    assert published.chosen == ("c",) and published.mean == pytest.approx(0.5)
    assert published.label == "tuned on the benchmark"


def test_every_query_has_the_score_of_the_value_chosen_without_it():
    masks, outputs, grid = noise(1)
    found = tune_on_split(iter(grid), masks, outputs)
    scores = dict(grid)
    expected = np.empty(8)
    for fold in (0, 1):
        inside = found.folds == fold
        means = {v: lds(scores[v][~inside], masks, outputs[:, ~inside]).mean for v in scores}
        assert found.chosen[fold] == max(means, key=means.get)
        expected[inside] = lds(scores[found.chosen[fold]][inside], masks, outputs[:, inside]).per_query
    np.testing.assert_allclose(found.per_query, expected)
    # The interval is that of scores put together in the same way.
    mixed = np.where((found.folds == 0)[:, None], scores[found.chosen[0]], scores[found.chosen[1]])
    assert found.interval == pytest.approx(lds(mixed, masks, outputs).interval)
    np.testing.assert_allclose(found.score.bootstrap, lds(mixed, masks, outputs).bootstrap)
    assert [part.per_query.tolist() for part in found.parts] == [expected[found.folds == f].tolist() for f in (0, 1)]


def test_halves_of_the_subsets():
    masks, outputs, grid = noise(2, values=5)
    found = tune_on_split(grid, masks, outputs, split="subsets", level=0.9)
    scores, parts = dict(grid), []
    for fold in (0, 1):
        inside = found.folds == fold
        means = {v: lds(scores[v], masks[~inside], outputs[~inside]).mean for v in scores}
        assert found.chosen[fold] == max(means, key=means.get)
        parts.append(lds(scores[found.chosen[fold]], masks[inside], outputs[inside]))
    np.testing.assert_allclose(found.per_query, (parts[0].per_query + parts[1].per_query) / 2)
    middle, error = found.mean, np.hypot(parts[0].standard_error, parts[1].standard_error) / 2
    assert found.interval == pytest.approx((middle - 1.761310 * error, middle + 1.761310 * error), rel=1e-6)  # t of 14
    assert (found.score, found.label) == (None, "tuned on other subsets")


def mean_and_error(values):
    return np.mean(values), np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize("shared", [False, True])
def test_tuning_on_the_benchmark_overstates(shared):
    """Scores that know nothing have an LDS of 0, whichever of them is chosen honestly."""
    found = {"benchmark": [], "queries": [], "subsets": []}
    for seed in range(16):
        masks, outputs, grid = noise(100 + seed, values=8, shared=shared)
        for how, means in found.items():
            options = {"tune_on_benchmark": True} if how == "benchmark" else {"split": how}
            means.append(tune_on_split(grid, masks, outputs, **options).mean)
    mean, error = mean_and_error(found["benchmark"])
    assert mean > 6 * error and mean > 0.1
    mean, error = mean_and_error(found["queries"])
    # What all queries share betrays the other half of them, and only subsets are independent then.
    assert (mean > 6 * error) if shared else (abs(mean) < 3 * error)
    mean, error = mean_and_error(found["subsets"])
    assert abs(mean) < 3 * error


def test_folds_depend_on_nothing_but_their_number():
    assert two_folds(9).tolist() == two_folds(9).tolist() and sorted(two_folds(9).tolist()) == [0] * 5 + [1] * 4
    assert two_folds(40).tolist() != two_folds(40, seed=1).tolist()
    masks, outputs, grid = noise(3, values=2)
    assert tune_on_split(grid, masks, outputs).folds.tolist() == two_folds(8).tolist()
    assert tune_on_split(grid, masks, outputs, split="subsets").folds.tolist() == two_folds(16).tolist()


def test_what_is_not_a_number_is_not_chosen():
    grid = {"nan": [[np.nan, 1, 2]] * 4, "bad": [BAD] * 4}
    found = tune_on_split(grid.items(), MASKS, OUTPUTS)
    assert found.chosen == ("bad", "bad") and found.mean == pytest.approx(-1) and np.isnan(found.curve["nan"])
    assert np.isnan(tune_on_split([("nan", grid["nan"])], MASKS, OUTPUTS).mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": []}, "grid must hold a value, got none"),
        ({"grid": [(1, [GOOD] * 4), (1, [BAD] * 4)]}, "grid must name each value once, got 1 twice"),
        ({"split": "images"}, "split must be one of queries, subsets, got 'images'"),
        ({"folds": [0, 1]}, r"folds must be 4 integers, 0 and 1 and both of them, got array\(\[0, 1\]\)"),
        ({"folds": [1] * 4}, "folds must be 4 integers, 0 and 1 and both of them"),
    ],
)
def test_refusals(change, message):
    arguments = {"grid": [(1, [GOOD] * 4)], "masks": MASKS, "outputs": OUTPUTS, **change}
    with pytest.raises(ValueError, match=f"tune_on_split: {message}"):
        tune_on_split(**arguments)
