"""DAS against models that are retrained without an image, which the linear case allows exactly."""

import pytest
import torch
from torch import nn

from pyattr.attribution import DAS, DTRAK, QUERY_IDS, Readout
from pyattr.diffusion import noise
from pyattr.ops import sign_matrix

SETTINGS = {"proj_dim": 16, "num_timesteps": 3, "seed": 5, "noise_seed": 2}
WIDTH = 6


class Curves(nn.Module):
    """e = theta . c(x_t) for a single pixel x_t, c fixed curves: a scalar prediction, linear in theta."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)

    @staticmethod
    def curves(pixel):  # [...] -> [..., WIDTH]
        return torch.stack([torch.cos(k * pixel + k * k) for k in range(WIDTH)], -1)

    def forward(self, images, timesteps):
        return self.theta(self.curves(images.flatten()))[:, None, None, None]


@pytest.fixture
def queries():
    return torch.randint(0, 256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(9)).to(torch.uint8)


def noisy(schedule, images, ids, t):
    eps = noise(images.shape[1:], seed=2, ids=torch.as_tensor(ids), timesteps=t).double()
    return schedule.add_noise(images, eps, torch.full((len(images),), t)), eps


@pytest.mark.parametrize("count", [25, 80])  # fewer training images than columns of the features, and more
def test_the_change_of_the_prediction_by_leaving_an_image_out(schedule, count):
    """Ridge regression at one timestep, solved again without each image: a score is the square of what that changes."""
    images = torch.linspace(-1, 1, count, dtype=torch.float64).view(-1, 1, 1, 1)
    queries = torch.tensor([-0.9, -0.1, 0.3], dtype=torch.float64).view(-1, 1, 1, 1)
    x, eps = noisy(schedule, images, range(count), 500)
    x_q, _ = noisy(schedule, queries, range(QUERY_IDS, QUERY_IDS + 3), 500)
    inputs, targets, inputs_q = Curves.curves(x.flatten()), eps.flatten(), Curves.curves(x_q.flatten())
    # Of the projected gradients M c, lambda penalises the parameters theta' of theta = M^T theta'.
    signs, lambda_ = sign_matrix(range(64), range(WIDTH), 5).double(), 0.5
    penalty = lambda_ * torch.linalg.inv(signs.T @ signs)
    everyone = torch.arange(count)

    def solve(keep):
        return torch.linalg.solve(inputs[keep].T @ inputs[keep] + penalty, inputs[keep].T @ targets[keep])

    model = Curves()
    model.theta.weight.data = solve(everyone)[None]
    change = torch.stack([inputs_q @ (solve(everyone[everyone != n]) - solve(everyone)) for n in range(count)], 1)

    def scores(**others):
        settings = {"residuals": True, "leverage": True, "normalize": False, "proj_dim": 64, "num_timesteps": 1}
        method = DAS(
            model, schedule, strategy="midpoint", seed=5, noise_seed=2, lambda_=lambda_, **{**settings, **others}
        )
        return method.fit(images).scores(queries).double()

    torch.testing.assert_close(scores(), change.square(), rtol=1e-6, atol=1e-6 * float(change.square().max()))
    torch.testing.assert_close(scores(squared=False).abs(), change.abs(), rtol=1e-6, atol=1e-6)
    # Without the one factor or the other it is another number.
    for option in ("residuals", "leverage"):
        assert not torch.allclose(scores(**{option: False}), change.square(), rtol=0.01)


def test_the_published_form(linear_net, schedule, images, queries):
    """D-TRAK's matrix with the gradients of mean e, normalised, and squared."""
    model = linear_net(4)
    plain = DTRAK(model, schedule, feature="avg", normalize=True, lambda_=3.0, **SETTINGS).fit(images)
    found = DAS(model, schedule, lambda_=3.0, **SETTINGS).fit(images)
    assert torch.equal(found.scores(queries), Readout("squared")(plain.scores(queries)))
    signed = DAS(model, schedule, squared=False, lambda_=3.0, **SETTINGS).fit(images)
    assert torch.equal(signed.scores(queries), plain.scores(queries))
    assert (found.signed, signed.signed, DAS.default_feature) == (False, True, "avg")
    l1 = DAS(model, schedule, feature="l1", lambda_=3.0, **SETTINGS).fit(images)
    assert not torch.allclose(l1.scores(queries), found.scores(queries), rtol=0.01)


def test_factors_of_columns(linear_net, schedule, images, queries):
    """Residuals by a loop, leverages by the definition, at each lambda of a grid."""
    model = linear_net(4)
    settings = {**SETTINGS, "squared": False, "num_noises": 2, "timesteps_per_pass": 4, "batch_size": 4}
    plain = DAS(model, schedule, **settings).fit(images)
    calls = []
    both = DAS(model, schedule, residuals=True, leverage=True, progress=lambda *c: calls.append(c), **settings)
    both.fit(images)
    assert [call for call in calls if call[2] == "residuals"] == [(n, 9, "residuals") for n in (4, 8, 9)]
    errors = []
    for n, image in enumerate(images):
        losses = []
        for t in (0, 333, 666):
            for draw in range(2):
                eps = noise((1, 2, 2), seed=2, ids=n, timesteps=t, draws=draw).double()
                x = schedule.add_noise((image.double() / 127.5 - 1)[None], eps[None], torch.tensor([t]))
                losses.append((model(x, None)[0] - eps).square().mean())
        errors.append(torch.stack(losses).mean().sqrt().detach())
    phi = plain._train[0].tensor().double()
    for lambda_, scores in both.scores_grid(queries, [0.2, 40.0]):
        hat = phi @ torch.linalg.inv(phi.T @ phi + lambda_ * torch.eye(16, dtype=torch.float64)) @ phi.T
        expected = plain.scores(queries, lambda_=lambda_).double() * torch.stack(errors) / (1 - hat.diagonal())
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(scores, both.scores(queries, lambda_=lambda_))


def test_what_is_refused(linear_net, schedule, images, queries):
    with pytest.raises(RuntimeError, match="DAS: fit must be called before scores"):
        DAS(linear_net(4), schedule, **SETTINGS).scores(queries)
    with pytest.raises(ValueError, match="DAS: lambda_ must be positive and finite, got 0"):
        DAS(linear_net(4), schedule, lambda_=0)
    with pytest.raises(ValueError, match="features: images must hold at least one image, got none"):
        DAS(linear_net(4), schedule, residuals=True, **SETTINGS).fit(images[:0])
