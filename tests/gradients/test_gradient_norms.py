"""Norms of gradients that are never whole, against the norms of gradients by definition."""

import pytest
import torch
from small_models import Images, Network, flat, loss, make_batch, network, over_time, squares
from torch import nn

from pyattr.gradients import gradient_norms


@pytest.mark.filterwarnings("ignore::pyattr.gradients.FallbackWarning")
@pytest.mark.parametrize("loss", [loss, over_time])
def test_equals_the_norm_of_the_flat_gradient(loss, definition):
    """Tied weights, layers that run twice, a parameter without a rule, frozen and unused ones."""
    module, batch = Network().double(), make_batch()
    expected = torch.linalg.vector_norm(flat(definition(module, loss, batch)), dim=1)
    got = gradient_norms(module, loss, batch)
    assert got.shape == (6,) and got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_a_small_budget_changes_rounding_only(definition):
    module, images = Images(), torch.randn(5, 3, 10, 9)
    double = Images().double()
    double.load_state_dict(module.state_dict())

    def image_loss(module, x):
        return module(x).square().sum((1, 2))

    expected = torch.linalg.vector_norm(flat(definition(double, image_loss, images.double())), dim=1)
    torch.testing.assert_close(gradient_norms(module, image_loss, images), expected, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"gradient_norms: memory must be at least [0-9]+ bytes for one sample, got 1"):
        gradient_norms(module, image_loss, images, memory=1)
    for memory in (200_000, 1_000_000):
        torch.testing.assert_close(
            gradient_norms(module, image_loss, images, memory=memory), expected, rtol=1e-4, atol=0
        )
    with pytest.raises(TypeError, match="gradient_norms: memory must be an integer, got float"):
        gradient_norms(module, image_loss, images, memory=1e9)


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_squares_beyond_float32_are_kept(scale):
    """||g|| = |x| ||(1, 2)||: its square is neither 0 nor infinite."""
    module = nn.Linear(2, 1, bias=False)

    def linear(module, batch):
        return module(batch)[:, 0]

    batch = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]]) * scale
    got = gradient_norms(module, linear, batch)
    torch.testing.assert_close(got, torch.tensor([5.0, 0, 1], dtype=torch.float64) * scale, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_stay_with_their_sample():
    module, batch = network(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    batch[2, 0, 0, 0] = float("nan")
    got = gradient_norms(module, squares, batch)
    assert got.isnan().tolist() == [False, False, True, False]
