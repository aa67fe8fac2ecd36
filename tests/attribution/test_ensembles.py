"""Means of scores over models."""

import pytest
import torch

from pyattr.attribution import DAS, DTRAK, QUERY_IDS, TRAK, Ensemble, GradientDot, RawPixel, readout

SETTINGS = {"proj_dim": 16, "num_timesteps": 3, "seed": 5, "noise_seed": 2}
LAMBDAS = (0.7, 30.0, 4.0)


@pytest.fixture
def queries():
    return torch.randint(0, 256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(9)).to(torch.uint8)


@pytest.fixture
def build(linear_net, schedule):
    def made(method=TRAK, lambdas=LAMBDAS, **others):
        networks = [linear_net(4, seed=seed) for seed in (1, 2, 3)]
        return Ensemble(
            method(net, schedule, lambda_=value, **SETTINGS, **others)
            for net, value in zip(networks, lambdas, strict=True)
        )

    return made


def by_definition(explicit_features, linear_net, images, queries, lambdas):
    total = 0
    for seed, lambda_ in zip((1, 2, 3), lambdas, strict=True):
        theirs, ours = (
            explicit_features(linear_net(4, seed=seed), batch, ids, times=(0, 333, 666))
            for batch, ids in ((images, range(9)), (queries, range(QUERY_IDS, QUERY_IDS + 3)))
        )
        gram = theirs.T @ theirs + lambda_ * torch.eye(16, dtype=torch.float64)
        total = total + ours @ torch.linalg.solve(gram, theirs.T) / 3
    return total


def test_the_mean_over_models_each_at_its_own_lambda(build, explicit_features, linear_net, images, queries):
    fitted = build()
    assert fitted.fit(images) is fitted and fitted.signed is True
    found = fitted.scores(queries)
    assert found.dtype == torch.float32
    expected = by_definition(explicit_features, linear_net, images, queries, LAMBDAS)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    other = (0.1, 0.2, 500.0)
    expected = by_definition(explicit_features, linear_net, images, queries, other)
    torch.testing.assert_close(fitted.scores(queries, lambda_=other).double(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fitted.scores(queries, ids=[0, 1, 2]), found)


def test_a_grid_of_choices_is_each_choice_for_itself(build, images, queries):
    fitted = build(DTRAK).fit(images)
    choices = [(0.7, 0.7, 0.7), (1, 20, 300)]
    found = list(fitted.scores_grid(queries, choices))
    assert [choice for choice, _ in found] == choices
    for choice, scores in found:
        assert torch.equal(scores, fitted.scores(queries, lambda_=choice))
    assert list(fitted.scores_grid(queries, [])) == []


def test_one_method_is_itself(linear_net, schedule, images, queries):
    alone = TRAK(linear_net(4), schedule, **SETTINGS).fit(images)
    assert torch.equal(Ensemble([alone]).scores(queries), alone.scores(queries))


def test_das_is_a_mean_of_squares_or_the_square_of_a_mean(linear_net, schedule, images, queries):
    networks = [linear_net(4, seed=seed) for seed in (1, 2)]

    def of(squared):
        options = {"feature": "simple", "squared": squared, **SETTINGS}
        return Ensemble([DAS(network, schedule, **options) for network in networks]).fit(images)

    one, other = (method.scores(queries) for method in of(False).methods)
    squares, mean = of(True), of(False)
    assert squares.signed is False and mean.signed is True
    exact = {"rtol": 1e-5, "atol": 1e-12}
    found, square = squares.scores(queries), readout(mean.scores(queries), "squared")
    torch.testing.assert_close(found, (one**2 + other**2) / 2, **exact)
    torch.testing.assert_close(square, ((one + other) / 2) ** 2, **exact)
    assert (found > 1.01 * square).any()  # by the variance over the models


def test_methods_of_other_kinds(linear_net, schedule, images, queries):
    dots = [GradientDot(linear_net(4, seed=seed), schedule, **SETTINGS) for seed in (1, 2)]
    found = Ensemble(dots).fit(images).scores(queries)
    torch.testing.assert_close(found, (dots[0].scores(queries) + dots[1].scores(queries)) / 2)
    assert Ensemble([*dots, RawPixel()]).signed is False
    with pytest.raises(TypeError, match="Ensemble: GradientDot has no lambda to take from a grid"):
        Ensemble(dots).scores_grid(queries, [(1, 1)])


def test_what_is_refused(tmp_path, build, linear_net, schedule, images, queries):
    with pytest.raises(ValueError, match="Ensemble: methods must hold at least one, got none"):
        Ensemble([])
    method = TRAK(linear_net(4), schedule, **SETTINGS)
    with pytest.raises(ValueError, match="Ensemble: methods must be different objects, got one of them twice"):
        Ensemble([method, method])
    with pytest.raises(ValueError, match=r"Ensemble: each method needs a directory of its own, got .* twice"):
        build(directory=tmp_path)
    fitted = build()
    with pytest.raises(RuntimeError, match="TRAK: fit must be called before scores"):
        fitted.scores(queries)
    fitted.fit(images)
    for given, shown in (((1.0, 2.0), 2), (5.0, 1)):
        with pytest.raises(ValueError, match=f"Ensemble: lambda_ must hold 3, one for each method, got {shown}"):
            fitted.scores(queries, lambda_=given)
    with pytest.raises(ValueError, match=r"TRAK: lambda_ must be positive and finite, got -1\.0"):
        fitted.scores_grid(queries, [(1, -1, 1)])
