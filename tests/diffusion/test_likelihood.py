"""The exact likelihood: closed forms of Gaussian data, other solvers, finite differences, and uniform noise."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyattr.diffusion import (
    NoiseScore,
    Schedule,
    VarianceExploding,
    VariancePreserving,
    bits_per_dimension,
    dequantise,
    log_likelihood,
)
from pyattr.diffusion.schedule import ScaledLinearSchedule

SDES = {"exploding": VarianceExploding(5.0), "preserving": VariancePreserving(), "wide": VarianceExploding(25.0)}
START = 1e-3


def normal(std: float):
    return torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.tensor(std, dtype=torch.float64))


class GaussianScore:
    """Of data that are N(mean, basis diag(variances) basis^T)."""

    def __init__(self, sde, dims: int):
        torch.manual_seed(1)
        self.sde = sde
        self.mean = torch.randn(dims, dtype=torch.float64)
        self.basis = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64))[0]
        self.variances = torch.rand(dims, dtype=torch.float64) + 0.1

    def at(self, t: float):  # scale, [D] variances
        time = torch.tensor(t, dtype=torch.float64)
        scale = self.sde.scale(time)
        return scale, scale**2 * self.variances + self.sde.std(time) ** 2

    def __call__(self, x, t):
        scale, variances = self.at(float(t[0]))
        apart = (x.flatten(1) - scale.to(x) * self.mean.to(x)) @ self.basis.to(x)
        return -(apart / variances.to(x) @ self.basis.T.to(x)).view_as(x)

    def log_prob(self, x, start):
        """Of the flow from ``start`` to 1 with the process's own prior: deviations grow as the standard deviations do."""
        (first, before), (last, after) = self.at(start), self.at(1.0)
        ratio = (after / before).sqrt()
        end = last * self.mean + (ratio * ((x.flatten(1) - first * self.mean) @ self.basis)) @ self.basis.T
        return normal(self.sde.prior_std).log_prob(end).sum(1) + ratio.log().sum()


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", ["rk4", "rk45"])
@pytest.mark.parametrize("spacing", ["noise", "time"])
def test_gaussian_data_have_their_closed_form(name, solver, spacing):
    sde = SDES[name]
    score = GaussianScore(sde, 4)
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    options = {"steps": 60, "spacing": spacing, "rtol": 1e-8, "atol": 1e-9, "start": START, "at_a_time": 4}
    found = log_likelihood(score, x, sde, solver=solver, **options)
    wanted = score.log_prob(x, START)
    torch.testing.assert_close(found.log_prob, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.log_prob, found.prior + found.integral)
    assert found.noise.shape == x.shape


@pytest.mark.parametrize("name", SDES)
def test_noise_levels_are_those_of_their_times(name):
    sde = SDES[name]
    t = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sde.noise_level(t), (sde.std(t) / sde.scale(t)).log())
    torch.testing.assert_close(sde.time_at(sde.noise_level(t)), t, rtol=1e-9, atol=0)


def test_noise_levels_of_a_constant_beta():
    sde, t = VariancePreserving(3.0, 3.0), torch.tensor([0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sde.noise_level(t), (3 * t).expm1().log() / 2)
    torch.testing.assert_close(sde.time_at(sde.noise_level(t)), t)


def test_equal_steps_of_noise_resolve_what_equal_steps_of_time_cannot():
    """Data hardly wider than the least noise, as pixels are: the score is steep at small times."""
    sde = SDES["wide"]
    score = GaussianScore(sde, 4)
    score.variances = torch.full((4,), 1e-6, dtype=torch.float64)
    x = score.mean + 1e-3 * torch.randn(2, 4, dtype=torch.float64)
    wanted = score.log_prob(x, 1e-5)
    found = {
        spacing: log_likelihood(score, x, sde, steps=20, spacing=spacing).log_prob for spacing in ("noise", "time")
    }
    torch.testing.assert_close(found["noise"], wanted, rtol=0, atol=0.02)
    assert (found["time"] - wanted).abs().min() > 100


def test_steps_converge_at_the_order_of_their_method():
    sde = SDES["exploding"]
    score = GaussianScore(sde, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    wanted = score.log_prob(x, 0.1)
    for solver, order in (("euler", 1), ("heun", 2), ("rk4", 4)):
        errors = [
            (log_likelihood(score, x, sde, solver=solver, steps=n, start=0.1).log_prob - wanted).abs().max()
            for n in (10, 20)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


class Net(nn.Module):
    """A small score with everything in it: dense layers, normalisation, time."""

    def __init__(self, dims: int):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(dims + 1, 8), nn.GroupNorm(2, 8), nn.Linear(8, dims)
        self.double()

    def forward(self, x, t):
        wide = torch.cat([x.flatten(1), t[:, None]], 1)
        return 0.3 * self.last(nn.functional.silu(self.norm(self.first(wide)))).view_as(x) - 0.2 * x


def reference(score, x, sde, start):
    """With autograd's Jacobian and scipy's solver at a tight tolerance, one image."""
    shape = x.shape

    def right_side(t, state):
        image = torch.from_numpy(state[:-1]).view(1, *shape)
        time = torch.tensor([t], dtype=torch.float64)

        def velocity(z):
            return sde.drift(time) * z - sde.diffusion(time) ** 2 / 2 * score(z, time)

        jacobian = torch.autograd.functional.jacobian(velocity, image).reshape(image.numel(), -1)
        return np.append(velocity(image).detach().numpy().ravel(), jacobian.trace())

    found = scipy.integrate.solve_ivp(
        right_side, (start, 1.0), np.append(x.numpy().ravel(), 0.0), rtol=1e-11, atol=1e-11
    )
    end = torch.from_numpy(found.y[:-1, -1])
    return normal(sde.prior_std).log_prob(end).sum() + found.y[-1, -1]


@pytest.mark.parametrize("name", ["exploding", "preserving"])
def test_networks_agree_with_autograd_and_scipy(name):
    sde, net = SDES[name], Net(4)
    x = torch.randn(2, 4, dtype=torch.float64)
    wanted = torch.stack([reference(net, one, sde, 1e-5) for one in x])
    fixed = log_likelihood(net, x, sde, steps=100, at_a_time=3)
    adaptive = log_likelihood(net, x, sde, solver="rk45", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fixed.log_prob, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(adaptive.log_prob, wanted, rtol=0, atol=1e-6)
    assert fixed.evaluations == 4 * 100


def test_an_image_does_not_depend_on_its_batch():
    sde, net = SDES["exploding"], Net(4)
    x = torch.randn(3, 4, dtype=torch.float64)
    for options in ({"solver": "rk45"}, {"steps": 5}, {"steps": 5, "divergence": "hutchinson", "probes": 3}):
        together = log_likelihood(net, x, sde, ids=[5, 9, 2**40], **options).log_prob
        alone = log_likelihood(net, x[1:2], sde, ids=[9], **options).log_prob
        torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_mean_is_the_exact_integral(probe):
    sde, net = SDES["exploding"], Net(4)
    x = torch.randn(1, 4, dtype=torch.float64)
    exact = log_likelihood(net, x, sde, solver="euler", steps=5).log_prob
    options = {"divergence": "hutchinson", "probe": probe, "solver": "euler", "steps": 5}
    each = torch.stack(
        [log_likelihood(net, x, sde, seed=s, probes=1, **options).log_prob for s in range(150)]
    )  # [150, 1]
    error = each.std() / 150**0.5
    assert 0 < error < 0.2 and (each.mean() - exact).abs() < 4 * error
    # Directions of one call are drawn apart, and averaged.
    many = log_likelihood(net, x, sde, probes=150, at_a_time=64, **options).log_prob
    assert (many - exact).abs() < 4 * error


def test_derivatives_through_the_solver_are_those_of_finite_differences():
    sde, net = SDES["exploding"], Net(3)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    options = {"steps": 6, "at_a_time": 2}
    plain = log_likelihood(net, x, sde, **options).log_prob
    found = log_likelihood(net, x, sde, gradient="backprop", **options)
    torch.testing.assert_close(found.log_prob, plain, rtol=1e-12, atol=1e-12)
    tensors = [x, *net.parameters()]
    slopes = torch.autograd.grad(found.log_prob.sum(), tensors)
    for tensor, slope in zip(tensors, slopes, strict=True):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            values = []
            for step in (1e-5, -1e-5):
                tensor += step * direction
                values.append(log_likelihood(net, x, sde, **options).log_prob.sum())
                tensor -= step * direction
        wanted = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((slope * direction).sum(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ["rk4", "rk45"])
def test_the_adjoint_gives_the_derivatives_of_the_solver_in_the_limit(solver):
    sde, net = SDES["exploding"], Net(3)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    tensors = [x, *net.parameters()]
    weights = torch.tensor([1.0, -0.4], dtype=torch.float64)
    options = {"steps": 60, "spacing": "time"}
    exact = log_likelihood(net, x, sde, gradient="backprop", **options).log_prob
    wanted = torch.autograd.grad((exact * weights).sum(), tensors)
    found = log_likelihood(net, x, sde, solver=solver, rtol=1e-9, atol=1e-9, gradient="adjoint", **options).log_prob
    slopes = torch.autograd.grad((found * weights).sum(), tensors)
    for ours, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_hutchinson_is_differentiable_too():
    sde, net = SDES["exploding"], Net(3)
    x = torch.randn(2, 3, dtype=torch.float64)
    options = {"divergence": "hutchinson", "probes": 2, "steps": 40, "spacing": "time"}
    found = [
        torch.autograd.grad(log_likelihood(net, x, sde, gradient=kind, **options).log_prob.sum(), net.first.weight)[0]
        for kind in ("backprop", "adjoint")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spacing", ["noise", "time"])
def test_a_gradient_may_be_taken_in_tensors_that_are_no_module(spacing):
    sde = SDES["exploding"]
    factor = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, dtype=torch.float64)

    def score(x, t):
        return factor * x

    options = {"steps": 80, "spacing": spacing, "start": 0.05}
    found = log_likelihood(score, x, sde, gradient="adjoint", parameters=[factor], **options).log_prob
    wanted = log_likelihood(score, x, sde, gradient="backprop", **options).log_prob
    torch.testing.assert_close(found, wanted)
    (ours,), (theirs,) = (torch.autograd.grad(value.sum(), factor) for value in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    with pytest.raises(TypeError, match="parameters must be given where score is no module, got function"):
        log_likelihood(score, x, sde, gradient="adjoint")


def test_bits_of_an_even_distribution_are_eight_whatever_the_range():
    # Uniform on [0, 1]^D has density 1, on [-1, 1]^D density 2^-D.
    assert bits_per_dimension(torch.tensor(0.0), 784) == 8
    assert bits_per_dimension(torch.tensor(-784 * math.log(2)), 784, low=-1) == pytest.approx(8)
    with pytest.raises(ValueError, match=r"dimensions must be at least 1 and low below high, got 0, 0\.0, 1\.0"):
        bits_per_dimension(torch.zeros(1), 0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1))
def test_dequantised_pixels_stay_in_their_share_and_come_again(seed, id_):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = dequantise(levels, seed=seed, ids=[id_])
    assert (x * 256).floor().to(torch.uint8).equal(levels)
    assert dequantise(levels.expand(2, -1, -1, -1), seed=seed, ids=[id_ ^ 1, id_])[1:].equal(x)
    shifted = dequantise(levels, seed=seed, ids=[id_], low=-1.0)
    torch.testing.assert_close(shifted, 2 * x - 1, rtol=0, atol=1e-6)


def test_dequantisation_is_even():
    u = dequantise(torch.zeros(40, 50, 50, dtype=torch.uint8)) * 256
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


def test_the_noise_of_a_ddpm_is_the_score_of_its_limit():
    schedule = Schedule()
    sde = VariancePreserving.of(schedule)
    assert sde == VariancePreserving()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(sde.scale(t) ** 2, schedule.alphas_cumprod, rtol=0, atol=2.1e-3)
    seen = []

    class Model(nn.Module):
        def forward(self, x, labels):
            seen.append(labels)
            return 2 * x

    x = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    times = torch.tensor([0.001, 0.5004, 1.0], dtype=torch.float64)
    found = NoiseScore(Model(), schedule)(x, times)
    torch.testing.assert_close(found, -2 * x / sde.std(times)[:, None, None, None])
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 499.4, 999.0], dtype=torch.float64))
    NoiseScore(Model(), schedule, round_labels=True)(x, times)
    assert seen[1].tolist() == [0, 499, 999] and seen[1].dtype == torch.int64


def test_standard_deviations_of_the_exploding_process():
    # (25^2 - 1) / (2 ln 25) = 624 / 6.43775 = 96.928, whose root is 9.8452.
    assert VarianceExploding().prior_std == pytest.approx(9.8452, abs=5e-5)
    assert float(VarianceExploding().std(torch.tensor(0.5))) == pytest.approx((24 / 6.437752) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"divergence": "trace"}, "divergence must be one of exact, hutchinson, got 'trace'"),
        ({"solver": "rk5"}, "solver must be one of euler, heun, rk4, rk45, got 'rk5'"),
        ({"spacing": "log"}, "spacing must be one of noise, time, got 'log'"),
        ({"probe": "sign"}, "probe must be one of rademacher, gaussian, got 'sign'"),
        ({"gradient": "both"}, "gradient must be one of None, backprop, adjoint, got 'both'"),
        ({"start": 0.0}, r"start must lie in \(0, 1\), got 0.0"),
        ({"steps": 0}, r"steps must lie in \[1, 2147483648\], got 0"),
        ({"probes": 0}, r"probes must lie in \[1, 4096\], got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 4294967295\], got -1"),
        ({"rtol": 0.0}, "rtol and atol must be positive, got 0.0 and 1e-05"),
        ({"ids": [1, 2], "divergence": "hutchinson"}, r"ids must be 1 integers, got shape \[2\]"),
        ({"solver": "rk45", "gradient": "backprop"}, "gradient='backprop' needs a solver of fixed steps, got 'rk45'"),
        ({"parameters": []}, "parameters goes with gradient='adjoint' and with nothing else, got None"),
    ],
)
def test_bad_options_are_refused_before_the_score_is_asked(options, told):
    def score(x, t):
        raise AssertionError("asked")

    with pytest.raises(ValueError, match=f"log_likelihood: {told}"):
        log_likelihood(score, torch.zeros(1, 2), VarianceExploding(), **options)


def test_bad_images_are_refused():
    for images, kind, told in (
        (
            torch.zeros(1, 2, dtype=torch.uint8),
            TypeError,
            "images must be a float32 or float64 tensor, got torch.uint8",
        ),
        (torch.zeros(0, 2), ValueError, r"images must have shape \[B, \*shape\] and hold something, got \[0, 2\]"),
        (torch.zeros(2), ValueError, r"images must have shape \[B, \*shape\] and hold something, got \[2\]"),
    ):
        with pytest.raises(kind, match=told):
            log_likelihood(lambda x, t: x, images, VarianceExploding())
    with pytest.raises(TypeError, match=r"dequantise: images must be uint8, got torch\.float32"):
        dequantise(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"schedule must have linear betas, got ScaledLinearSchedule\("):
        VariancePreserving.of(ScaledLinearSchedule())
    with pytest.raises(ValueError, match=r"VarianceExploding: sigma must be above 1, got 1\.0"):
        VarianceExploding(1.0)
