import numpy as np
import pytest
import torch
from torch import nn

from pyattr.diffusion import ScoreLoss, ScoreNet, VarianceExploding, VariancePreserving


def test_the_tutorials_network():
    torch.manual_seed(0)
    net = ScoreNet()
    assert sum(p.numel() for p in net.parameters()) == 1_115_297
    assert net.frequencies.shape == (128,)
    assert 20 < float(net.frequencies.std()) < 40
    shapes = []
    for conv in (*net.down, *net.up):
        conv.register_forward_hook(lambda module, inputs, output: shapes.append(list(output.shape[1:])))
    x, t = torch.rand(2, 1, 28, 28), torch.tensor([0.1, 0.9])
    out = net(x, t)
    assert out.shape == x.shape
    assert shapes == [[32, 26, 26], [64, 12, 12], [128, 5, 5], [256, 2, 2], [128, 5, 5], [64, 12, 12], [32, 26, 26]]
    torch.testing.assert_close(net(x[1:], t[1:]), out[1:], rtol=1e-4, atol=1e-5)
    half = ScoreNet(scale=0.5)
    half.load_state_dict(net.state_dict())
    torch.testing.assert_close(half(x, t), out / 2)
    assert (net(x, t.flip(0)) - out).abs().max() > 0.1


@pytest.mark.parametrize("widths", [(6, 32, 32, 32), (8, 32, 48, 32), (8, 32, 32)])
def test_widths_that_groups_do_not_divide(widths):
    with pytest.raises(ValueError, match="ScoreNet: widths must be a multiple of 4 and three of 32, got"):
        ScoreNet(widths=widths)


def test_odd_embeddings():
    with pytest.raises(ValueError, match="ScoreNet: embedding must be even and positive, got 3"):
        ScoreNet(embedding=3)


def test_a_spacing_that_there_is_not():
    with pytest.raises(ValueError, match="ScoreLoss: spacing must be one of noise, time, got 'log'"):
        ScoreLoss(VarianceExploding(), spacing="log")


class Shrink(nn.Module):
    """The exact score of images that are all zero: ``-x / std^2``."""

    def __init__(self, sde):
        super().__init__()
        self.sde, self.one = sde, nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return -self.one * x / self.sde.std(t)[:, None, None, None] ** 2


@pytest.mark.parametrize("sde", [VarianceExploding(), VariancePreserving()], ids=["ve", "vp"])
def test_the_exact_score_has_no_loss(sde):
    losses = ScoreLoss(sde)(Shrink(sde), torch.zeros(5, 1, 4, 4), np.random.default_rng(0))
    torch.testing.assert_close(losses, torch.zeros(5), atol=1e-4, rtol=0)


def test_what_the_loss_sees():
    """With the score of zero images, std s + eps = -scale x / std: the loss says t and the range of the pixels."""
    sde, images = (
        VarianceExploding(),
        torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).repeat(1, 1, 2, 3),
    )
    found = ScoreLoss(sde, start=0.5)(Shrink(sde), images, np.random.default_rng(4))
    t = torch.from_numpy(0.5 + 0.5 * np.random.default_rng(4).random(3)).float()
    expected = 6 * (torch.tensor([0.0, 0.2, 1.0]) / sde.std(t)) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    mean = ScoreLoss(sde, start=0.5, mean=True)(Shrink(sde), images, np.random.default_rng(4))
    torch.testing.assert_close(mean, found / 6)
    shifted = ScoreLoss(sde, start=0.5, low=-1.0)(Shrink(sde), images, np.random.default_rng(4))
    torch.testing.assert_close(shifted, 6 * (torch.tensor([-1.0, -0.6, 1.0]) / sde.std(t)) ** 2, rtol=1e-3, atol=1e-6)
    first, last = sde.noise_level(torch.tensor([0.5, 1.0], dtype=torch.float64))
    level = first + (last - first) * torch.from_numpy(np.random.default_rng(4).random(3))
    even = ScoreLoss(sde, start=0.5, spacing="noise")(Shrink(sde), images, np.random.default_rng(4))
    torch.testing.assert_close(
        even, (6 * (torch.tensor([0.0, 0.2, 1.0]) / level.exp()) ** 2).float(), rtol=1e-3, atol=1e-6
    )
    same = ScoreLoss(sde, start=0.5)(Shrink(sde), images.float() / 255, np.random.default_rng(4))
    torch.testing.assert_close(same, found)
