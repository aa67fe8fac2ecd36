"""Tail patch on a model whose step and loss are written down, and leaving one image out."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from pyattr.diffusion import Conditioned, Samples, Schedule
from pyattr.evaluation import lds, leave_one_out_masks, tail_patch

SCHEDULE = Schedule(8, 1e-2, 0.4)


class Mean(nn.Module):
    """The best denoiser of the image ``mean``: its loss at x is |x - mean|^2 abar / (1 - abar) / D, whatever the noise."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.full((1, 2, 2), mean, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, images, timesteps):
        abar = SCHEDULE.alphas_cumprod[timesteps][:, None, None, None]
        return self.drop((images - abar.sqrt() * self.mean) / (1 - abar).sqrt())


def ratio(timesteps):
    """The mean of abar / (1 - abar) over evenly spaced timesteps."""
    stride = 8 // timesteps
    abar = SCHEDULE.alphas_cumprod[torch.arange(timesteps) * stride + stride // 2]
    return float((abar / (1 - abar)).mean())


IMAGES = torch.tensor([0.5, -0.5, 0.25, 0.0])[:, None, None, None].expand(4, 1, 2, 2)
QUERIES = torch.tensor([0.5, -0.25])[:, None, None, None].expand(2, 1, 2, 2)
SCORES = {"one": [[4.0, 3, 2, 1], [0, 1, 1, 0]]}


def patch(model, queries=QUERIES, scores=SCORES, **changes):
    given = {"learning_rate": 0.01, "top": 2, "timesteps": 4, "step_timesteps": 2, **changes}
    return tail_patch(model, SCHEDULE, given.pop("images", IMAGES), queries, scores, **given)


@pytest.mark.parametrize("steps", [1, 3])
def test_gains_by_hand(steps):
    model = Mean(0.1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    found = patch(model, steps=steps, progress=lambda *now: told.append(now))
    assert found.methods == ("one", "random") and found.proponents.shape == (2, 2, 2)
    np.testing.assert_array_equal(found.proponents[0], [[0, 1], [1, 2]])
    assert all(len(set(row.tolist())) == 2 for row in found.proponents[1])
    for a in range(2):
        for q in range(2):
            for k in range(2):
                x, y, mean = float(QUERIES[q].mean()), float(IMAGES[found.proponents[a, q, k]].mean()), 0.1
                for _ in range(steps):  # the gradient of the mean over four pixels falls to each by a quarter
                    mean -= 0.01 * 2 / 4 * ratio(2) * (mean - y)
                gain = ratio(4) * ((x - 0.1) ** 2 - (x - mean) ** 2)
                np.testing.assert_allclose(found.gains[a, q, k], gain, rtol=1e-5, atol=1e-9)
    effects = found.effects
    np.testing.assert_allclose(effects.of("one"), found.gains[0].mean(1))
    assert effects.name == "gain by a step on a proponent" and effects.counts == (2,)
    different = len(np.unique(found.proponents))
    assert told == [(done, different, "tail patch") for done in range(different + 1)]
    # As it was, dropout at work again, and no gradient left behind.
    assert model.drop.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_proponents_help_and_opponents_do_not():
    found = patch(Mean(0.0), scores={"like": -(QUERIES.flatten(1)[:, :1] - IMAGES.flatten(1)[:, 0]).abs()}, top=1)
    assert (found.effects.of("like") > 0).all()
    opposed = patch(Mean(0.0), scores={"unlike": (QUERIES.flatten(1)[:, :1] - IMAGES.flatten(1)[:, 0]).abs()}, top=1)
    assert (opposed.effects.of("unlike") < 0).all()


def test_weights_come_back_when_it_is_interrupted():
    model = Mean(0.1)

    def stop(done, total, stage):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(model, progress=stop)
    assert (model.mean == 0.1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"top": 5}, r"top must lie in \[1, 4\], got 5"),
        ({"steps": 0}, r"steps must lie in \[1, 2147483648\], got 0"),
        ({"step_timesteps": 9}, r"step_timesteps must lie in \[1, 8\], got 9"),
        ({"timesteps": 9}, r"timesteps must lie in \[1, 8\], got 9"),
        ({"query_ids": [1, 1]}, r"query_ids must be 2 distinct integers, got shape \[2\]"),
        ({"query_ids": [3, -1]}, r"query_ids must lie in \[0, 2\^63\), got -1"),
        ({"queries": QUERIES[:0]}, r"queries must be at least one image of shape \[1, 2, 2\], got \[0, 1, 2, 2\]"),
        ({"scores": {"random": SCORES["one"]}}, "scores must be of at least one method, and none of the name 'random'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=f"tail_patch: {message}"):
        patch(Mean(0.1), **changes)


def test_masks_leave_one_image_out():
    np.testing.assert_array_equal(leave_one_out_masks(3), ~np.eye(3, dtype=bool))
    np.testing.assert_array_equal(leave_one_out_masks(4, [2, 0]), [[1, 1, 0, 1], [0, 1, 1, 1]])
    assert leave_one_out_masks(4, np.empty(0, np.int64)).shape == (0, 4)


def test_lds_on_them_is_the_rank_correlation_with_leaving_one_out():
    rng = np.random.default_rng(0)
    items = np.array([5, 2, 39, 11, 17, 0, 8])
    scores, outputs = rng.standard_normal((3, 40)).astype(np.float32), rng.standard_normal((7, 3))
    found = lds(scores, leave_one_out_masks(40, items), outputs)
    expected = [scipy.stats.spearmanr(scores[q, items], outputs[:, q]).statistic for q in range(3)]
    np.testing.assert_allclose(found.per_query, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), ValueError, "num_images must be at least 2, got 1"),
        ((4, [1, 1]), ValueError, r"items must be distinct integers \[M\], got 2 of shape \[2\]"),
        ((4, [1, 4]), ValueError, r"items must lie in \[0, 4\), got 1..4"),
        ((4, [1.5]), TypeError, "items must be integers, got torch.float64"),
    ],
)
def test_refusals_of_masks(arguments, error, message):
    with pytest.raises(error, match=f"leave_one_out_masks: {message}"):
        leave_one_out_masks(*arguments)


class Told(Mean):
    """The best denoiser of an image that the condition doubles."""

    num_conditions = 2

    def forward(self, images, timesteps, conditions):
        abar = SCHEDULE.alphas_cumprod[timesteps][:, None, None, None]
        mean = self.mean * (1 + conditions)[:, None, None, None]
        return self.drop((images - abar.sqrt() * mean) / (1 - abar).sqrt())


def test_conditions_of_images_and_queries_count():
    conditions, asked = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1])
    found = patch(Told(0.1), Conditioned(QUERIES, asked), images=Conditioned(IMAGES, conditions))
    for q in range(2):
        for k, n in enumerate(found.proponents[0, q]):
            x, y = float(QUERIES[q].mean()), float(IMAGES[n].mean())
            told, factor = 1 + int(conditions[n]), 1 + int(asked[q])
            mean = 0.1 - 0.01 * 2 / 4 * ratio(2) * told * (told * 0.1 - y)
            gain = ratio(4) * ((x - factor * 0.1) ** 2 - (x - factor * mean) ** 2)
            np.testing.assert_allclose(found.gains[0, q, k], gain, rtol=1e-5, atol=1e-9)
    samples = Samples(QUERIES, torch.tensor([0, 1]), QUERIES[:, None], None, torch.tensor([0]), {}, asked)
    again = patch(Told(0.1), samples, images=Conditioned(IMAGES, conditions))
    np.testing.assert_array_equal(again.gains, found.gains)
    with pytest.raises(TypeError, match="tail_patch: images must be Conditioned, for a model that takes conditions"):
        patch(Told(0.1))
    with pytest.raises(
        TypeError, match="tail_patch: queries must be plain images, for a model that takes no conditions"
    ):
        patch(Mean(0.1), Conditioned(QUERIES, asked))
