import dataclasses

import pytest
import torch

from pyattr.attribution import QUERY_IDS, TRAK, JourneyTRAK
from pyattr.diffusion import Schedule, sample

SETTINGS = {"proj_dim": 16, "num_timesteps": 3, "seed": 5, "noise_seed": 2, "lambda_": 0.7}


@pytest.fixture
def made(linear_net, schedule):
    model = linear_net(4)
    return model, sample(model, schedule, ids=[4, 9], shape=(1, 2, 2), steps=5, record="trajectory")


def predictions(model, samples):
    """The clipped x0 of each step, [Q, S, 1, 2, 2]."""
    weight, rows = model.layer.weight.detach(), []
    for path in samples.trajectory.double():
        steps = []
        for x, t in zip(path[:-1], samples.timesteps, strict=True):
            abar = Schedule().alphas_cumprod[t]
            e = (weight @ x.flatten()).view_as(x)
            steps.append(((x - (1 - abar).sqrt() * e) / abar.sqrt()).clamp(-1, 1))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


@pytest.mark.parametrize("noises", [1, 2])
def test_linear_model_in_closed_form(explicit_features, schedule, images, made, noises):
    model, samples = made
    fitted = JourneyTRAK(model, schedule, query_noises=noises, timesteps_per_pass=3, **SETTINGS).fit(images)
    theirs = explicit_features(model, images, range(9), times=(0, 333, 666))
    steps = predictions(model, samples)
    assert (steps.abs() == 1).any() and (steps.abs() < 1).any(), "some of it is clipped, and some is not"
    gram = theirs.T @ theirs + 0.7 * torch.eye(16, dtype=torch.float64)
    for given, ids in ((None, [QUERY_IDS + 4, QUERY_IDS + 9]), ([3, 8], [3, 8])):
        ours = explicit_features(model, steps, ids, times=samples.timesteps.tolist(), noises=noises)
        expected = ours @ torch.linalg.solve(gram, theirs.T)
        torch.testing.assert_close(fitted.scores(samples, ids=given).double(), expected, atol=1e-5, rtol=1e-4)


def test_the_training_side_is_found_as_traks(tmp_path, monkeypatch, linear_net, schedule, images, made):
    model, samples = made
    expected = TRAK(model, schedule, directory=tmp_path, **SETTINGS).fit(images).eigenvalues
    calls, forward = [], linear_net.forward
    monkeypatch.setattr(linear_net, "forward", lambda self, *given: (calls.append(1), forward(self, *given))[1])
    fitted = JourneyTRAK(model, schedule, directory=tmp_path, **SETTINGS).fit(images)
    assert not calls and torch.equal(fitted.eigenvalues, expected)
    first = fitted.scores(samples)
    count = len(calls)
    assert count >= 5  # a pass for each step, besides the gradients
    fitted.scores(samples, lambda_=3.0)
    assert len(calls) == count  # nothing but the product is done again
    again = JourneyTRAK(model, schedule, directory=tmp_path, **SETTINGS).fit(images).scores(samples)
    assert len(calls) == count + 5 and torch.equal(again, first)  # the gradients are found
    torch.testing.assert_close(fitted.scores(samples[1:]), first[1:])
    assert fitted.scores(samples[:0]).shape == (0, 9)


def test_queries_without_a_journey_are_refused(linear_net, schedule, images, made):
    model, samples = made
    fitted = JourneyTRAK(model, schedule, **SETTINGS).fit(images)
    with pytest.raises(TypeError, match=r"JourneyTRAK: queries must be Samples .*, got Tensor"):
        fitted.scores(images)
    plain = sample(model, schedule, num_images=1, shape=(1, 2, 2), steps=2)
    with pytest.raises(ValueError, match=r"JourneyTRAK: queries must keep their trajectory: make them with sample"):
        fitted.scores(plain)
    for other in (linear_net(4, seed=1), schedule):
        like = Schedule(beta_end=0.03) if other is schedule else schedule
        network = model if other is schedule else other
        foreign = sample(network, like, num_images=1, shape=(1, 2, 2), steps=2, record="trajectory")
        differs = r"schedule\.beta_end was 0\.03, now 0\.02" if other is schedule else "model was"
        with pytest.raises(ValueError, match=f"JourneyTRAK: queries were made by another model or schedule: {differs}"):
            fitted.scores(foreign)
    with pytest.raises(RuntimeError, match="JourneyTRAK: fit must be called before scores"):
        JourneyTRAK(model, schedule, **SETTINGS).scores(samples)


def test_samples_of_a_model_with_other_parameters_frozen_are_its_own(schedule, images, made):
    model, samples = made
    frozen = dataclasses.replace(samples, settings={**samples.settings, "frozen": ["layer.weight"]})
    fitted = JourneyTRAK(model, schedule, **SETTINGS).fit(images)
    assert torch.equal(fitted.scores(frozen), fitted.scores(samples))
