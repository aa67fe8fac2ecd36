"""Tuning finds the settings that losses were made with, and says how well they do."""

import re

import numpy as np
import pytest
import torch
from scipy import stats

from pyattr.attribution import NDA
from pyattr.attribution.patch_tuning import _lds

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 1, 6, 6), np.uint8)
QUERIES = RNG.integers(0, 256, (4, 1, 6, 6), np.uint8)
MASKS = RNG.permuted(np.tile([0, 1], (12, 4)), axis=1)  # [12, 8], half of the images in each
GRID = {"timesteps": [30, 200, 400], "patch_sizes": [1, 3, 5], "coarse_patch_sizes": [2, 4], "ks": [1, 4]}


def losses_of(**settings):
    """Losses that fall by the scores of the images present: what tuning takes for granted, with a scale of its own each."""
    scores = NDA(**settings).fit(IMAGES).scores(QUERIES).double().numpy()
    return 7 - MASKS @ scores.T * [0.1, 1, 5, 20]


def test_the_settings_that_made_the_losses_are_found():
    made = {"timesteps": [400], "patch_sizes": 3, "coarse_patch_sizes": 2, "alpha": 1.0, "k": 4}
    losses = losses_of(**made)
    method = NDA().fit(IMAGES)
    found = method.tune(MASKS, losses, QUERIES, **{**GRID, "timesteps": [400, 700]})
    assert found.lds == pytest.approx(1)
    assert (found.timesteps, found.patch_sizes, found.alpha, found.k) == ((400,), (3,), (1.0,), 4)
    # They are in use.
    np.testing.assert_allclose(method.scores(QUERIES), NDA(**made).fit(IMAGES).scores(QUERIES), rtol=1e-6)
    assert method.timesteps == [400] and method.k == 4 and [t.patch_size for t in method.terms] == [3]


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_a_mixture_of_scales_is_found(alpha):
    # So far apart that ranks of either scale alone are not those of both.
    made = {"timesteps": [400], "patch_sizes": 5, "coarse_patch_sizes": 4, "alpha": alpha, "k": 1}
    choices = {**GRID, "timesteps": [400], "ks": [1]}
    method = NDA().fit(IMAGES)
    found = method.tune(MASKS, losses_of(**made), QUERIES, **choices)
    assert max(found.tried.values()) < 0.99
    assert found.lds == pytest.approx(1)
    assert (found.patch_sizes, found.coarse_patch_sizes, found.alpha) == ((5,), (4,), (alpha,))
    assert set(found.tried) == {(400, p, False, 1) for p in (1, 3, 5)} | {(400, p, True, 1) for p in (2, 4)}


def test_tables_are_scored_by_spearmans_correlation():
    losses = np.random.default_rng(1).normal(size=(12, 4))
    method = NDA().fit(IMAGES)
    found = method.tune(MASKS, losses, QUERIES, **GRID)
    assert len(found.tried) == 3 * (3 + 2) * 2
    for (t, p, coarse, k), lds in found.tried.items():
        alone = NDA(timesteps=[t], patch_sizes=1 if coarse else p, coarse_patch_sizes=p if coarse else 2,
                    alpha=float(not coarse), k=k).fit(IMAGES).scores(QUERIES).double().numpy()  # fmt: skip
        predicted = -MASKS @ alone.T
        expected = np.mean([stats.spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(4)])
        assert lds == pytest.approx(expected, abs=1e-6)
    # What is chosen is as good as it says, and no worse than any table alone at its first timestep.
    predicted = -MASKS @ method.scores(QUERIES).double().numpy().T
    reached = np.mean([stats.spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(4)])
    assert found.lds == pytest.approx(reached, abs=1e-6)
    assert found.lds >= max(lds for (t, _, _, k), lds in found.tried.items() if t == 30 and k == found.k)


def test_timesteps_end_where_more_do_not_help():
    """Losses of the first timestep alone: the second brings only what disturbs."""
    losses = losses_of(timesteps=[30], patch_sizes=3, alpha=1.0, k=1)
    found = NDA().fit(IMAGES).tune(
        MASKS, losses, QUERIES, timesteps=[30, 900], patch_sizes=[3], coarse_patch_sizes=[2], ks=[1], alphas=[1.0]
    )  # fmt: skip
    assert found.timesteps == (30,) and found.lds == pytest.approx(1)


def test_a_scale_without_a_part_is_not_computed():
    method = NDA().fit(IMAGES)
    found = method.tune(MASKS, np.arange(48.0).reshape(12, 4), QUERIES, **{**GRID, "timesteps": [30]}, alphas=[0.0])
    assert {coarse for _, _, coarse, _ in found.tried} == {True}
    assert all(term.coarse for term in method.terms)


def test_constant_losses_tell_nothing():
    assert _lds(np.random.default_rng(0).normal(size=(5, 2)), np.ones((5, 2))) == 0


def test_predictions_are_found_again(tmp_path, monkeypatch):
    losses, told = losses_of(timesteps=[30], patch_sizes=3, alpha=1.0, k=1), []
    first = NDA(directory=tmp_path, num_noises=2, progress=lambda *of: told.append(of)).fit(IMAGES)
    expected = first.tune(MASKS, losses, QUERIES, **GRID)
    assert told[0] == (0, 240, "tuning") and told[-1] == (240, 240, "tuning")  # 30 tables, 2 draws, 4 queries
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    monkeypatch.setattr(NDA, "compute", None)
    again = NDA(directory=tmp_path, num_noises=2).fit(IMAGES)
    assert again.tune(MASKS, losses, QUERIES, **GRID) == expected
    # Other losses need no other tables.
    again.tune(MASKS, losses[::-1], QUERIES, **GRID)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was made otherwise: num_noises was 2, now 1"):
        NDA(directory=tmp_path).fit(IMAGES).tune(MASKS, losses, QUERIES, **GRID)


def test_an_interrupted_tuning_leaves_the_settings(monkeypatch):
    method = NDA(k=7).fit(IMAGES)

    def interrupted(done, total, stage):
        raise KeyboardInterrupt

    method.progress = interrupted
    with pytest.raises(KeyboardInterrupt):
        method.tune(MASKS, np.zeros((12, 4)), QUERIES, **GRID)
    assert method.k == 7 and method.timesteps == [100, 200, 300, 400, 500]


def test_default_choices_scale_with_the_image():
    side = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    found = NDA(timesteps=[100]).fit(side).tune([[0, 1], [1, 0]], [[1.0], [2.0]], side[:1], ks=[1])
    assert sorted(p for _, p, coarse, _ in found.tried if not coarse) == [3, 5]
    assert sorted(p for _, p, coarse, _ in found.tried if coarse) == [4, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": MASKS[:, :7]}, "NDA: masks must have shape [M, 8] with M at least 2, got [12, 7]"),
        ({"masks": MASKS * 2}, "NDA: masks must hold 0 and 1 alone"),
        ({"losses": np.zeros((12, 3))}, "NDA: losses must have shape [12, 4] with Q at least 1, got [12, 3]"),
        ({"losses": np.full((12, 4), np.nan)}, "NDA: losses must be finite"),
        ({"timesteps": [5, 3]}, "NDA: timesteps to choose from must rise and lie in [0, 1000), got [5, 3]"),
        ({"patch_sizes": []}, "NDA: patch_sizes to choose from must be possible and at least one, got []"),
        ({"patch_sizes": [3, 513]}, "NDA: patch_sizes must be at most 511, got 513"),
        ({"coarse_patch_sizes": [3]}, "NDA: coarse_patch_sizes must be positive and even, got 3"),
        ({"ks": [0]}, "NDA: ks to choose from must be possible and at least one, got [0]"),
        ({"alphas": [2.0]}, "NDA: alphas to choose from must be possible and at least one, got [2.0]"),
    ],
)  # fmt: skip
def test_refusals(changes, message):
    given = {"masks": MASKS, "losses": np.zeros((12, 4)), "queries": QUERIES, **GRID, **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NDA().fit(IMAGES).tune(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [3.7]}, "NDA: each of timesteps must be an integer, got 3.7"),
        ({"timesteps": 30}, "NDA: timesteps must be a sequence, got 30"),
        ({"patch_sizes": 3}, "NDA: patch_sizes must be a sequence, got 3"),
        ({"coarse_patch_sizes": [4.0]}, "NDA: each of coarse_patch_sizes must be an integer, got 4.0"),
        ({"ks": 10}, "NDA: ks must be a sequence, got 10"),
        ({"alphas": 0.5}, "NDA: alphas must be a sequence, got 0.5"),
        ({"alphas": "01"}, "NDA: alphas must be a sequence, got '01'"),
        ({"losses": [["a"] * 4] * 12}, "NDA: losses must be an array or lists of numbers, got list"),
        ({"masks": [[1], [0, 1]]}, "NDA: masks must be an array or lists of numbers, got list"),
    ],
)
def test_choices_of_another_kind(changes, message):
    given = {"masks": MASKS, "losses": np.zeros((12, 4)), "queries": QUERIES, **GRID, **changes}
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        NDA().fit(IMAGES).tune(**given)


def test_losses_as_training_leaves_them():
    """Tensors that carry a gradient, of 16 bits, and masks of booleans."""
    losses = torch.from_numpy(losses_of(timesteps=[30], patch_sizes=3, alpha=1.0, k=1)).bfloat16()
    expected = NDA().fit(IMAGES).tune(MASKS, losses.double().numpy(), QUERIES, **GRID)
    found = NDA().fit(IMAGES).tune(torch.from_numpy(MASKS == 1), losses.requires_grad_(), QUERIES, **GRID)
    assert found == expected


def test_timesteps_of_the_method_in_any_order():
    losses = losses_of(timesteps=[30], patch_sizes=3, alpha=1.0, k=1)
    choices = {name: GRID[name] for name in ("patch_sizes", "coarse_patch_sizes", "ks")}
    falling, rising = (NDA(timesteps=t).fit(IMAGES) for t in ([400, 200, 30], [30, 200, 400]))
    assert falling.tune(MASKS, losses, QUERIES, **choices) == rising.tune(MASKS, losses, QUERIES, **choices)
    assert falling.terms == rising.terms


def test_images_without_room_for_a_coarse_patch(monkeypatch):
    pixel = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    method = NDA(timesteps=[30], alpha=1).fit(pixel)
    given = {"masks": [[0, 1], [1, 0]], "losses": [[1.0], [2.0]], "queries": pixel[:1], "ks": [1]}
    assert {coarse for _, _, coarse, _ in method.tune(**given, alphas=[1.0]).tried} == {False}
    monkeypatch.setattr(NDA, "compute", None)
    with pytest.raises(ValueError, match=r"^NDA: train must be images of at least 2 x 2 pixels for the coarse scale"):
        method.tune(**given)
