"""What MAGIC trains with and attributes, metasmoothness, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.attribution import MAGIC
from pyattr.attribution.magic import (
    Adam,
    LogLikelihood,
    NegativeLoss,
    NoiseLoss,
    Recipe,
    grid,
    metasmoothness,
    search,
)
from pyattr.attribution.magic.training import check_weights
from pyattr.diffusion import (
    Conditioned,
    Samples,
    Schedule,
    ScoreLoss,
    VarianceExploding,
    bits_per_dimension,
    dequantise,
    log_likelihood,
)

FAST = Adam(learning_rate=0.03, eps_root=1e-2)


def squares(model, rows, rng):
    return (model(rows) - rows).square().sum(1)


def fit_of(model, queries):
    return -(model(queries) - queries).square().sum(1)


@pytest.fixture
def rows():
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def method(net, loss=squares, phi=fit_of, **settings):
    return MAGIC(net, loss, phi, **{"steps": 5, "batch_size": 2, "optimiser": FAST, **settings})


# Losses and values of diffusion models


class Noise(nn.Module):
    """Predicts ``a x + b_c t``, c the condition."""

    def __init__(self, conditions=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.3, 0.1], dtype=torch.float64))
        if conditions:
            self.num_conditions = conditions

    def forward(self, x, t, c=None):
        told = 0 if c is None else c
        return self.scale[0] * x + (self.scale[1] * (1 + told) * t / 1000).to(x)[:, None, None, None]


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 1, 2, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_loss_of_noise(images, conditioned):
    schedule, model = Schedule(), Noise(3 if conditioned else None)
    told = torch.tensor([0, 1, 2, 1, 0])
    found = NoiseLoss(schedule)(model, Conditioned(images, told) if conditioned else images, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    t = torch.from_numpy(rng.integers(1000, size=5))
    eps = torch.from_numpy(rng.standard_normal((5, 1, 2, 2), dtype=np.float32)).double()
    abar = schedule.alphas_cumprod[t].double()[:, None, None, None]
    x = abar.sqrt() * (images.double() / 127.5 - 1) + (1 - abar).sqrt() * eps
    shift = 0.1 * (1 + (told if conditioned else 0)) * t / 1000
    expected = (0.3 * x + shift[:, None, None, None] - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_phi_is_minus_the_loss_over_draws_that_stay(images):
    model, loss = Noise(), NoiseLoss(Schedule())
    phi = NegativeLoss(loss, draws=7, seed=4)
    found = phi(model, images)
    assert found.shape == (5,)
    rng = np.random.Generator(np.random.Philox(key=[4, 0x6E656761]))
    torch.testing.assert_close(found[2], -loss(model, images[2:3].repeat(7, 1, 1, 1), rng).mean())
    torch.testing.assert_close(phi(model, images[2:3]), found[2:3])
    assert not torch.equal(NegativeLoss(loss, draws=7, seed=5)(model, images), found)
    pair = NegativeLoss(lambda model, rows, rng: rows[0] * rows[1], draws=3)(model, (torch.arange(4.0), torch.ones(4)))
    assert torch.equal(pair, -torch.arange(4.0))
    for settings, message in (({"draws": 0}, "draws must be at least 1, got 0"), ({"seed": -1}, "seed must lie in")):
        with pytest.raises(ValueError, match=message):
            NegativeLoss(loss, **settings)


class Gaussian(nn.Module):
    """The score of data N(0, e^2a I) under a variance-exploding process."""

    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))

    def forward(self, x, t):
        return -x / ((2 * self.log_std).exp() + VarianceExploding().std(t)[:, None, None, None] ** 2)


def test_likelihoods(images):
    model, sde = Gaussian(), VarianceExploding()
    exact = {"solver": "rk4", "steps": 5}
    x = dequantise(images, ids=torch.zeros(5, dtype=torch.int64)).double()
    expected = log_likelihood(model, x, sde, **exact).log_prob.detach()
    found = LogLikelihood(sde, steps=5)(model, images)
    torch.testing.assert_close(found.detach(), expected)
    bits = LogLikelihood(sde, steps=5, bits=True, score=lambda model: lambda x, t: model(x, t))(model, x)
    torch.testing.assert_close(bits.detach(), -bits_per_dimension(expected, 4))
    (slope,) = torch.autograd.grad(found.sum(), model.log_std)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            model.log_std.add_(sign * 1e-4)
            values.append(LogLikelihood(sde, steps=5)(model, images).sum())
            model.log_std.sub_(sign * 1e-4)
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phi", [LogLikelihood(VarianceExploding(), steps=2), "loss"], ids=["nats", "loss"])
def test_scores_of_a_diffusion_model_are_derivatives(images, phi):
    """Through the solver, whose steps are checkpointed: their parameters must be those of the trained model."""
    loss = ScoreLoss(VarianceExploding(), mean=True)
    phi = NegativeLoss(loss, draws=4) if phi == "loss" else phi
    fitted = method(Gaussian(), loss, phi).fit(images)
    scores, h, values = fitted.scores(images[:2]), 1e-4, []
    for sign in (1, -1):
        weights = torch.ones(5, dtype=torch.float64)
        weights[3] += sign * h
        values.append(method(Gaussian(), loss, phi).fit(images, weights).values(images[:2]))
    expected = (values[0] - values[1]) / (2 * h)
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(scores[:, 3].double(), expected, rtol=1e-4, atol=1e-7)
    samples = Samples.__new__(Samples)
    object.__setattr__(samples, "images", images[:2].float() / 255)
    object.__setattr__(samples, "conditions", None)
    torch.testing.assert_close(fitted.values(samples), fitted.values(images[:2].float() / 255))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 12, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.mix(x.reshape(-1, 1, 3, 4)).chunk(3, 3)
        return nn.functional.scaled_dot_product_attention(q, k, v).reshape(-1, 12)


def test_attention_is_differentiated_twice():
    torch.manual_seed(2)
    net, rows, h, values = Attention(), torch.randn(4, 12, dtype=torch.float64), 1e-5, []
    found = method(net).fit(rows).scores(rows[:2])
    for sign in (1, -1):
        weights = 1 + sign * h * torch.eye(4, dtype=torch.float64)[1]
        values.append(method(net).fit(rows, weights).values(rows[:2]))
    torch.testing.assert_close(found[:, 1].double(), (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-6)


# Metasmoothness


def test_metasmoothness_compares_three_trainings(net, rows):
    v = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -1.0], dtype=torch.float64)
    recipe = Recipe(12, 2, Adam(learning_rate=0.3, eps_root=1e-6))
    found = metasmoothness(net, squares, rows, recipe, h=0.1, direction=v, seed=3)
    ends = []
    for number in range(3):
        fitted = MAGIC(net, squares, fit_of, seed=3, **recipe.settings).fit(rows, 1 + 0.1 * number * v)
        ends.append(torch.cat([p.reshape(-1) for p in fitted.model.parameters()]))
    d = ends[2] - ends[0]
    agree = (ends[1] - ends[0]).sign() * (ends[2] - ends[1]).sign()
    assert found.value == pytest.approx(float((d.abs() / d.abs().sum() * agree).sum()), abs=1e-9)
    assert -1 <= found.value < 1
    cosine = torch.dot(ends[1] - ends[0], ends[2] - ends[1]) / (ends[1] - ends[0]).norm() / (ends[2] - ends[1]).norm()
    assert found.linearity == pytest.approx(float(cosine))
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert found.change == pytest.approx(float(d.norm() / (ends[0] - start).norm()))
    fitted = MAGIC(net, squares, fit_of, seed=3, **recipe.settings).fit(rows)
    assert found.loss == pytest.approx(-float(fitted.values(rows).mean()))


def test_metasmoothness_is_taken_up_where_it_was(net, rows, tmp_path):
    recipe, calls = Recipe(6, 2, FAST), []
    whole = metasmoothness(net, squares, rows, recipe, seed=3)

    def stopped(done, total, stage):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metasmoothness(net, squares, rows, recipe, seed=3, directory=tmp_path, progress=stopped)
    again = metasmoothness(
        net, squares, rows, recipe, seed=3, directory=tmp_path, progress=lambda *call: calls.append(call)
    )
    assert again == whole
    assert [done for done, _, _ in calls] == list(range(6, 13)) + list(range(12, 19))  # the first training was there
    with pytest.raises(ValueError, match="holds another training"):
        metasmoothness(net, squares, rows, recipe, seed=4, directory=tmp_path)


def test_a_training_that_does_not_see_its_items_is_smooth(net, rows):
    found = metasmoothness(net, lambda model, rows, rng: 0 * squares(model, rows, rng), rows, Recipe(3, 2, FAST))
    assert (found.value, found.linearity, found.change) == (1.0, 1.0, 0.0)


def test_the_search_prefers_smooth_recipes_that_train(net, rows):
    recipes = grid([30], [3], learning_rate=[1e-4, 0.01, 3.0], eps_root=[1e-3])
    assert recipes == [Recipe(30, 3, Adam(learning_rate=rate, eps_root=1e-3)) for rate in (1e-4, 0.01, 3.0)]
    calls, seen = [], []
    order = search(net, squares, rows, recipes, progress=lambda *call: calls.append(call), found=seen.append)
    assert [outcome.recipe for outcome in seen] == recipes
    assert [outcome.recipe.optimiser.learning_rate for outcome in order] == [0.01, 1e-4, 3.0]
    assert order[0].loss < order[1].loss
    assert order[2].value < 0.9 < min(order[0].value, order[1].value)
    assert calls[-1] == (270, 270, "metasmoothness")
    counts = [done for done, _, _ in calls]
    assert counts == sorted(counts) and set(counts) == set(range(271))


def test_a_search_goes_on_and_takes_new_recipes_up(net, rows, tmp_path):
    recipes = grid([30], [3], learning_rate=[1e-4, 0.01], eps_root=[1e-3])
    whole = search(net, squares, rows, recipes, seed=3)
    calls = []

    def stop(done: int, of: int, stage: str) -> None:
        calls.append(done)
        if done == 100:  # in the second recipe
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(net, squares, rows, recipes, seed=3, directory=tmp_path, progress=stop)
    calls.clear()
    again = search(
        net,
        squares,
        rows,
        recipes[::-1],
        seed=3,
        directory=tmp_path,
        progress=lambda done, of, stage: calls.append(done),
    )
    assert again == whole
    assert len(set(calls)) < 100  # of 180 steps those of the first recipe were there
    with pytest.raises(ValueError, match="holds another training"):
        search(net, squares, rows, recipes, seed=4, directory=tmp_path)


def test_a_recipe_that_diverges_comes_last(net, rows):
    recipes = [Recipe(3, 2, Adam(learning_rate=1e200, warmup=0, schedule="constant")), Recipe(3, 2, FAST)]
    order = search(net, squares, rows, recipes)
    assert [outcome.recipe for outcome in order] == recipes[::-1]
    assert math.isnan(order[1].value)
    assert order[1].loss == math.inf


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"eps_root": 0.0}, "eps_root must be positive, got 0.0"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine, linear, got 'step'"),
        ({"warmup": 1.5}, r"warmup must lie in \[0, 1\], got 1.5"),
    ],
)
def test_optimisers_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"Adam: {message}"):
        Adam(**settings)


def test_arguments_that_are_refused(net, rows):
    with pytest.raises(ValueError, match="MAGIC: steps must be at least 1, got 0"):
        method(net, steps=0)
    with pytest.raises(TypeError, match="MAGIC: batch_size must be an integer, got float"):
        method(net, batch_size=2.0)
    with pytest.raises(
        ValueError, match="MAGIC: memory must hold at least two states of 408 bytes each, got 500 bytes"
    ):
        method(net, memory=500)
    with pytest.raises(RuntimeError, match="MAGIC: fit must be called first"):
        method(net).scores(rows)
    with pytest.raises(ValueError, match=r"MAGIC: seed must lie in \[0, 4294967295\], got -1"):
        method(net, seed=-1).fit(rows)
    with pytest.raises(ValueError, match="MAGIC: train must hold at least one item, got none"):
        method(net).fit(rows[:0])
    with pytest.raises(ValueError, match=r"tensors that belong together must have as many rows, got \[5, 6\]"):
        method(net).fit((rows, rows[:5]))
    with pytest.raises(TypeError, match="MAGIC: train must be a torch tensor"):
        method(net).fit([1, 2])
    with pytest.raises(
        ValueError, match=r"MAGIC: weights must be 6 finite numbers, one for each item, got shape \[5\]"
    ):
        method(net).fit(rows, torch.ones(5))
    with pytest.raises(ValueError, match="MAGIC: loss must give one number for each of 2 items, got shape"):
        method(net, lambda model, rows, rng: squares(model, rows, rng).sum()).fit(rows)
    with pytest.raises(FloatingPointError, match="MAGIC: the loss is inf at step 0: lower learning_rate"):
        method(net, lambda model, rows, rng: squares(model, rows, rng) * math.inf).fit(rows)
    with pytest.raises(ValueError, match="MAGIC: model must have parameters that require a gradient, got none"):
        method(nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False), checkpointing="all").fit(rows)
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(
        ValueError, match=r"one floating-point dtype on one device, got torch\.float32 on cpu, torch\.float64"
    ):
        method(mixed).fit(rows)
    with pytest.raises(ValueError, match="model must not gather running statistics, got 1 in training mode"):
        method(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()).fit(rows)
    fitted = method(net).fit(rows)
    with pytest.raises(ValueError, match=r"removed must be bool of shape \[M, 6\], got torch.int64 of shape \[1, 6\]"):
        fitted.predict(rows, torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="phi must give one number for each query, got shape"):
        method(net, phi=lambda model, queries: model(queries).sum()).fit(rows).values(rows)
    assert torch.equal(check_weights([1, 2, 3], 3, rows), torch.tensor([1, 2, 3], dtype=torch.float64))


def test_the_model_that_is_given_stays_as_it_is(net, rows):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fitted = method(net).fit(rows)
    fitted.scores(rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert sorted(fitted.losses) == list(range(5))
    assert fitted.signed
