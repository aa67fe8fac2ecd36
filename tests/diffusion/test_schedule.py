import pytest
import torch
from diffusers import DDPMScheduler

from pyattr.diffusion import Schedule


def test_alphas_cumprod_literals():
    abar = Schedule().alphas_cumprod
    assert abar.dtype == torch.float64 and abar.shape == (1000,)
    expected = {0: 0.9999, 100: 0.89514, 200: 0.65635, 300: 0.39401, 400: 0.19357, 500: 0.07780}
    for t, value in expected.items():
        assert float(abar[t]) == pytest.approx(value, abs=1e-5)
    assert float(abar[999]) == pytest.approx(4.036e-5, rel=1e-3)


def test_three_steps_by_hand():
    schedule = Schedule(num_timesteps=3, beta_start=0.1, beta_end=0.3)
    torch.testing.assert_close(schedule.betas, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504], dtype=torch.float64))
    # beta / (2 (1 - beta) (1 - abar)): 0.1 / (2 * 0.9 * 0.1), 0.2 / (2 * 0.8 * 0.28), 0.3 / (2 * 0.7 * 0.496)
    weights = torch.tensor([1 / 1.8, 0.2 / 0.448, 0.3 / 0.6944], dtype=torch.float64)
    torch.testing.assert_close(schedule.elbo_weights(torch.arange(3)), weights)
    noisy = schedule.add_noise(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([1]))
    assert float(noisy) == pytest.approx(2 * 0.72**0.5 - 0.28**0.5, rel=1e-6)


def test_add_noise_is_that_of_diffusers():
    schedule, theirs = Schedule(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    images, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    t = torch.tensor([0, 1, 500, 998, 999])
    ours = schedule.add_noise(images, noise, t)
    torch.testing.assert_close(ours, theirs.add_noise(images, noise, t), atol=2e-6, rtol=2e-5)


def test_add_noise_keeps_dtype_and_takes_leading_dimensions():
    images, noise = torch.randn(2, 1, 1, 3, 3, dtype=torch.float64), torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    t = torch.tensor([[0, 10, 20, 999]]).expand(2, -1)
    noisy = Schedule().add_noise(images, noise, t)
    assert noisy.dtype == torch.float64 and noisy.shape == (2, 4, 1, 3, 3)
    one = Schedule().add_noise(images[1], noise[1, 3:], torch.tensor([999]))
    torch.testing.assert_close(noisy[1, 3:], one, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps must be at least 1, got 0"),
        ({"beta_start": 0.0}, "betas must satisfy"),
        ({"beta_end": 1.0}, "betas must satisfy"),
        ({"beta_start": 0.1, "beta_end": 0.05}, "betas must satisfy"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)
