"""Derivatives through training, against autograd through the unrolled training, finite differences, and each other."""

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.attribution import MAGIC
from pyattr.attribution.magic import SCHEMES, Adam
from pyattr.attribution.magic.rows import Several
from pyattr.attribution.magic.training import WeightedTraining

N, B, STEPS = 7, 3, 9
ADAM = Adam(learning_rate=0.05, eps_root=1e-3, weight_decay=0.02, warmup=0.3)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.first.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))[:, 0]


def noisy_squares(model, rows, rng):
    x, y = rows
    noise = torch.from_numpy(rng.standard_normal(x.shape)).to(x)
    return (model(x + 0.3 * noise) - y).square()


def negative_squares(model, queries):
    x, y = queries
    return -(model(x) - y).square()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def train():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, x.sum(1).sin()


@pytest.fixture
def queries():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x, x.cos().sum(1)


def magic(model=None, steps=STEPS, optimiser=ADAM, **settings):
    return MAGIC(
        Net() if model is None else model,
        noisy_squares,
        negative_squares,
        steps=steps,
        batch_size=B,
        optimiser=optimiser,
        seed=11,
        **{"memory": 5 * 3 * 8 * 21, **settings},
    )


def rate(optimiser, step, steps):
    """The published schedules, written down once more."""
    warmup = math.ceil(optimiser.warmup * steps)
    if step < warmup:
        return optimiser.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    after = {"constant": 1, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return optimiser.learning_rate * after[optimiser.schedule]


def unrolled(weights, train, queries, optimiser=ADAM, steps=STEPS):
    """phi [Q] as a differentiable function of the weights: no step is detached."""
    model, (x, y) = Net(), train
    training = WeightedTraining(
        model, noisy_squares, Several(train), steps=steps, batch_size=B, optimiser=optimiser, seed=11
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theta = [dict(model.named_parameters())[name] for name in names]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    (first, second) = optimiser.betas
    for step in range(steps):
        items = training.slots(step)
        rng = np.random.Generator(np.random.Philox(key=[11, 0x6D737470], counter=[0, 0, 0, step]))
        rng.integers(2**63)  # dropout's seed
        inputs = x[items] + 0.3 * torch.from_numpy(rng.standard_normal((B, 3)))
        predicted = torch.func.functional_call(model, dict(zip(names, theta, strict=True)), (inputs,))
        total = (weights[items] * (predicted - y[items]).square()).sum() / B
        gradients = torch.autograd.grad(total, theta, create_graph=True)
        m = [first * a + (1 - first) * g for a, g in zip(m, gradients, strict=True)]
        v = [second * a + (1 - second) * g**2 for a, g in zip(v, gradients, strict=True)]
        for i, p in enumerate(theta):
            mhat, vhat = m[i] / (1 - first ** (step + 1)), v[i] / (1 - second ** (step + 1))
            change = mhat / ((vhat + optimiser.eps_root).sqrt() + optimiser.eps) + optimiser.weight_decay * p
            theta[i] = p - rate(optimiser, step, steps) * change
    out = torch.func.functional_call(model, dict(zip(names, theta, strict=True)), (queries[0],))
    return -(out - queries[1]).square()


@pytest.mark.parametrize(
    "optimiser",
    [
        ADAM,
        Adam(learning_rate=0.1, schedule="constant", warmup=0.0, betas=(0.0, 0.5), eps=0.0, eps_root=1e-4),
        Adam(learning_rate=0.1, schedule="linear", warmup=1.0),
    ],
    ids=["cosine", "constant", "warmup"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_autograd_through_the_unrolled_training(scheme, optimiser, train, queries):
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda w: unrolled(w, train, queries, optimiser), weights)
    fitted = magic(checkpointing=scheme, branching=2, optimiser=optimiser).fit(train, weights)
    torch.testing.assert_close(fitted.values(queries), unrolled(weights, train, queries, optimiser).detach())
    found = fitted._derivatives(queries)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert torch.equal(fitted.scores(queries), found.float())


def test_equals_finite_differences(train, queries):
    h, found = 1e-5, magic().fit(train)._derivatives(queries)
    for item in range(N):
        values = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[item] += sign * h
            values.append(magic().fit(train, weights).values(queries))
        torch.testing.assert_close((values[0] - values[1]) / (2 * h), found[:, item], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 11])
def test_the_same_bits_for_every_scheme_query_by_query_and_from_disk(tmp_path, steps, train, queries):
    single = tuple(t.float() for t in train), tuple(t.float() for t in queries)
    settings = {"model": Net(torch.float32), "steps": steps, "branching": 3}
    expected = magic(checkpointing="all", **settings).fit(single[0])._derivatives(single[1])
    seen = WeightedTraining(Net(), noisy_squares, Several(train), steps=steps, batch_size=B, optimiser=ADAM, seed=11)
    items = {int(i) for step in range(steps) for i in seen.slots(step)}
    assert (expected.abs().amin(0) > 0).nonzero().flatten().tolist() == sorted(items)
    for scheme in SCHEMES:
        fitted = magic(checkpointing=scheme, memory=4 * 3 * 4 * 21, queries_at_a_time=3, **settings).fit(single[0])
        assert torch.equal(fitted._derivatives(single[1]), expected)
        assert torch.equal(fitted._derivatives(single[1]), expected)  # what the first reversal dropped is made again
        one = tuple(part[2:3] for part in single[1])
        assert torch.equal(fitted._derivatives(one), expected[2:3])
        there = magic(checkpointing=scheme, directory=tmp_path / scheme, **settings).fit(single[0])
        assert torch.equal(there._derivatives(single[1]), expected)


def test_a_removed_item_is_not_seen(train, queries):
    fitted = magic().fit(train)
    removed = torch.zeros(2, N, dtype=torch.bool)
    removed[0, 4] = True
    values = fitted.retrain(queries, removed)
    other = (train[0].clone(), train[1].clone())
    other[0][4], other[1][4] = -5.0, 100.0
    assert torch.equal(magic().fit(other, (~removed[0]).double()).values(queries), values[0])
    assert torch.equal(values[1], fitted.values(queries))
    with torch.no_grad():
        torch.testing.assert_close(-(fitted.model(queries[0]) - queries[1]).square(), values[1])


def test_predictions(train, queries):
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    fitted = magic().fit(train, weights)
    removed = torch.zeros(3, N, dtype=torch.bool)
    removed[1, 2] = removed[2, :2] = True
    scores, values = fitted._derivatives(queries), fitted.values(queries)
    expected = torch.stack(
        [values, values - weights[2] * scores[:, 2], values - 0.5 * scores[:, 0] - weights[1] * scores[:, 1]]
    )
    torch.testing.assert_close(fitted.predict(queries, removed), expected)
    assert fitted.predict(queries, removed[:0]).shape == (0, 4)
    assert fitted.retrain(queries, removed[:0]).shape == (0, 4)
    assert fitted.scores(tuple(part[:0] for part in queries)).shape == (0, N)


def test_items_take_the_slots_in_permutations(train):
    training = WeightedTraining(Net(), noisy_squares, Several(train), steps=9, batch_size=B, optimiser=ADAM, seed=11)
    slots = torch.cat([training.slots(step) for step in range(7)])
    for epoch in slots.split(N):
        assert sorted(epoch.tolist()) == list(range(N))
    assert not torch.equal(slots[:N], slots[N : 2 * N])
    assert torch.equal(training.slots(1), slots[3:6])
    whole = WeightedTraining(Net(), noisy_squares, Several(train), steps=9, batch_size=2 * N, optimiser=ADAM, seed=11)
    assert torch.equal(whole.slots(0), slots[: 2 * N])
