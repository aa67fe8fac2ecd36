import math

import pytest
import torch

from pyattr.diffusion import Loss, Schedule
from pyattr.diffusion.losses import NAMES, as_loss

PREDICTION = torch.tensor([1.0, -2.0, 2.0, 1.0]).reshape(1, 1, 2, 2)
NOISE = torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(1, 1, 2, 2)
# Worked by hand from the two rows above; the variational bound's weight at t = 0 is 1 / (2 (1 - 1e-4)).
EXPECTED = {
    Loss("simple"): 1.5,
    Loss("elbo"): 1.5 / (2 * 0.9999),
    Loss("square"): 2.5,
    Loss("avg"): 0.5,
    Loss("l1"): 6.0,
    Loss("l2"): math.sqrt(10),
    Loss("linf"): 2.0,
    Loss("interpolate", 0.25): -0.125,
}


@pytest.mark.parametrize("loss", EXPECTED, ids=lambda loss: loss.name)
def test_by_hand(loss):
    # A second sample of another size of numbers shows that samples do not mix.
    value = loss(torch.cat([PREDICTION, 10 * PREDICTION]), torch.cat([NOISE, NOISE]), torch.tensor([0, 7]), Schedule())
    assert value.shape == (2,)
    assert float(value[0]) == pytest.approx(EXPECTED[loss], rel=1e-6)
    assert float(value[1]) != pytest.approx(float(value[0]), rel=1e-2)


def test_every_name_is_worked_by_hand():
    assert {loss.name for loss in EXPECTED} == set(NAMES)


def test_elbo_weights_follow_the_timestep():
    schedule, t = Schedule(), torch.tensor([3, 700])
    both = [PREDICTION.repeat(2, 1, 1, 1), NOISE.repeat(2, 1, 1, 1), t, schedule]
    torch.testing.assert_close(Loss("elbo")(*both), Loss("simple")(*both) * schedule.elbo_weights(t).float())


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.7, 1.0])
def test_gradient_of_the_interpolation(eta):
    prediction = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    value = Loss("interpolate", eta)(prediction, noise, torch.tensor([1, 2, 3]), Schedule())
    (gradient,) = torch.autograd.grad(value.sum(), prediction)
    torch.testing.assert_close(gradient, 2 * (eta * prediction - (1 - eta) * noise).detach() / 16)


def test_names_become_losses():
    assert as_loss("l1") == Loss("l1")
    assert as_loss(Loss("interpolate", 0.5)) == Loss("interpolate", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huber",), "name must be one of simple, elbo"),
        (("square", 0.5), "eta goes with interpolate"),
        (("interpolate",), "eta goes with interpolate"),
        (("interpolate", 1.5), r"eta must lie in \[0, 1\], got 1.5"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loss(*arguments)
