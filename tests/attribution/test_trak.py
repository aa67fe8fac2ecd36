import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pyattr.attribution import DTRAK, QUERY_IDS, TRAK
from pyattr.diffusion import Loss, Samples, Schedule, noise, sample, train, unet

SETTINGS = {"proj_dim": 16, "num_timesteps": 3, "seed": 5, "noise_seed": 2, "lambda_": 0.7}


def closed_form(phi, method, model, images, queries, query_ids, lambda_, query_noises=1):
    settings = {"times": (0, 333, 666), "squared": method is DTRAK}
    train_phi = phi(model, images, range(len(images)), **settings)
    query_phi = phi(model, queries, query_ids, noises=query_noises, **settings)
    gram = train_phi.T @ train_phi + lambda_ * torch.eye(16, dtype=torch.float64)
    return query_phi @ torch.linalg.solve(gram, train_phi.T)


@pytest.mark.parametrize("method", [TRAK, DTRAK])
@pytest.mark.parametrize("count", [9, 40])  # dual, primal
def test_linear_model_in_closed_form(linear_net, explicit_features, method, count):
    images = torch.randint(0, 256, (count, 1, 2, 2)).to(torch.uint8)
    queries = torch.randint(0, 256, (3, 1, 2, 2)).to(torch.uint8)
    model, schedule = linear_net(4), Schedule()
    fitted = method(model, schedule, **SETTINGS).fit(images)
    expected = closed_form(explicit_features, method, model, images, queries, QUERY_IDS + torch.arange(3), 0.7)
    torch.testing.assert_close(fitted.scores(queries).double(), expected, atol=1e-5, rtol=1e-4)
    expected = closed_form(explicit_features, method, model, images, queries, [1, 0, 7], 3.0)
    torch.testing.assert_close(
        fitted.scores(queries, lambda_=3.0, ids=[1, 0, 7]).double(), expected, atol=1e-5, rtol=1e-4
    )


def test_queries_with_more_noise_draws_than_training_images(linear_net, explicit_features, schedule, tmp_path):
    images, queries = torch.randint(0, 256, (2, 9, 1, 2, 2)).to(torch.uint8)
    model = linear_net(4)
    for noises in (3, 2):  # the features of one must not be taken for those of the other
        fitted = TRAK(model, schedule, query_noises=noises, directory=tmp_path, **SETTINGS).fit(images)
        expected = closed_form(
            explicit_features, TRAK, model, images, queries, QUERY_IDS + torch.arange(9), 0.7, noises
        )
        torch.testing.assert_close(fitted.scores(queries).double(), expected, atol=1e-5, rtol=1e-4)


def test_signed():
    assert TRAK.signed is True and DTRAK.signed is True


def test_positive_scores_mark_images_whose_absence_raises_the_loss(linear_net, schedule):
    """Leave each image out and solve the least squares problem of the linear model again, exactly."""
    count, times = 40, torch.tensor([0, 250, 500, 750])
    images = torch.rand(count, 1, 2, 2, dtype=torch.float64) * 2 - 1
    queries = images[:6] * 0.9

    def rows(batch, ids):  # [B * T, 4] twice
        eps = noise((1, 2, 2), seed=0, ids=torch.as_tensor(ids)[:, None], timesteps=times).double()
        x = schedule.add_noise(batch[:, None], eps, times.expand(len(batch), -1))
        return x.flatten(2), eps.flatten(2)

    x, eps = rows(images, range(count))
    x_q, eps_q = rows(queries, range(QUERY_IDS, QUERY_IDS + 6))

    def solve(keep):
        inputs, targets = x[keep].flatten(0, 1), eps[keep].flatten(0, 1)
        gram = inputs.T @ inputs + 1e-3 * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(gram, inputs.T @ targets).T

    def losses(weight):
        return (x_q @ weight.T - eps_q).square().mean((1, 2))

    everyone = torch.arange(count)
    model = linear_net(4)
    model.layer.weight.data = solve(everyone)
    base = losses(model.layer.weight.data)
    change = torch.stack([losses(solve(everyone[everyone != n])) - base for n in range(count)], 1)  # [Q, N]
    scores = TRAK(model, schedule, num_timesteps=4, proj_dim=4096, lambda_=100.0).fit(images).scores(queries)
    correlations = [spearmanr(s, c).statistic for s, c in zip(scores, change, strict=True)]
    assert min(correlations) > 0.5
    top = scores.argmax(1)
    assert (change.gather(1, top[:, None]) > 0).all()


@pytest.mark.parametrize("method", [TRAK, DTRAK])
def test_a_training_image_attributes_to_itself(method, schedule):
    torch.manual_seed(0)
    images = torch.rand(12, 1, 8, 8) * 2 - 1
    model = train(
        unet("mnist-small", size=8), images, schedule=schedule, steps=15, batch_size=12, learning_rate=2e-3
    ).model
    fitted = method(model, schedule, proj_dim=512, num_timesteps=20).fit(images)
    assert fitted.scores(images, ids=torch.arange(12)).argmax(1).tolist() == list(range(12))
    # With noise of its own, the image is still recognised far more often than one time in twelve.
    assert int((fitted.scores(images).argmax(1) == torch.arange(12)).sum()) >= 6


def test_samples_and_images_are_queries(linear_net, schedule, images):
    model = linear_net(4)
    samples = sample(model, schedule, ids=[3, 8], shape=(1, 2, 2), steps=5)
    fitted = TRAK(model, schedule, **SETTINGS).fit(images)
    as_samples = fitted.scores(samples)
    assert as_samples.shape == (2, 9) and as_samples.dtype == torch.float32
    assert torch.equal(as_samples, fitted.scores(samples.images, ids=[QUERY_IDS + 3, QUERY_IDS + 8]))
    assert not torch.equal(as_samples, fitted.scores(samples.images))  # ids 2^40 and 2^40 + 1
    assert torch.equal(as_samples[1:], fitted.scores(samples[1:]))
    assert isinstance(samples, Samples)


def test_scores_of_a_query_do_not_depend_on_the_others(linear_net, schedule, images):
    fitted = TRAK(linear_net(4), schedule, **SETTINGS, batch_size=2).fit(images)
    queries = torch.rand(5, 1, 2, 2)
    whole = fitted.scores(queries)
    part = fitted.scores(queries[2:4], ids=[QUERY_IDS + 2, QUERY_IDS + 3])
    torch.testing.assert_close(whole[2:4], part)
    assert fitted.scores(queries[:0]).shape == (0, 9)


def test_own_feature_functions(linear_net, schedule, images):
    model = linear_net(4)
    assert TRAK(model, schedule).feature_map.loss == Loss("simple")
    assert DTRAK(model, schedule).feature_map.loss == Loss("square")

    def scores(method, **others):
        return method(model, schedule, **{**SETTINGS, **others}).fit(images).scores(images)

    assert torch.equal(scores(TRAK, feature="square"), scores(DTRAK))
    # eta = 1/2 halves every gradient, so a quarter of lambda gives the same scores.
    halved = scores(DTRAK, feature=Loss("interpolate", 0.5), lambda_=0.7 / 4)
    torch.testing.assert_close(halved, scores(TRAK), atol=1e-5, rtol=1e-4)


def test_lambda_is_cheap_to_change(linear_net, schedule, images):
    calls = []
    fitted = TRAK(linear_net(4), schedule, **SETTINGS, progress=lambda *call: calls.append(call)).fit(images)
    assert [call for call in calls if call[2] == "eigendecomposition"] == [
        (0, 1, "eigendecomposition"),
        (1, 1, "eigendecomposition"),
    ]
    first = fitted.scores(images)
    seen = len(calls)
    assert calls[-1] == (9, 9, "query features")
    second = fitted.scores(images, lambda_=7.0)
    assert len(calls) == seen and not torch.equal(first, second)
    assert torch.equal(fitted.scores(images), first)


def test_directory_keeps_features_of_training_images_and_queries(tmp_path, linear_net, schedule, images):
    def run():
        calls = []
        fitted = TRAK(
            linear_net(4), schedule, **SETTINGS, directory=tmp_path, progress=lambda *call: calls.append(call)
        )
        scores = fitted.fit(images).scores(images[:2])
        return scores, [call for call in calls if "features" in call[2]]

    first, worked = run()
    second, found = run()
    assert torch.equal(first, second)
    assert worked == [(0, 9, "features"), (9, 9, "features"), (0, 2, "query features"), (2, 2, "query features")]
    assert found == [(9, 9, "features"), (2, 2, "query features")]
    with pytest.raises(ValueError, match="was made otherwise: proj_dim was 16, now 17"):
        TRAK(linear_net(4), schedule, **{**SETTINGS, "proj_dim": 17}, directory=tmp_path).fit(images)


def test_a_model_that_changed_since_fit_is_refused(linear_net, schedule, images):
    model = linear_net(4)
    fitted = TRAK(model, schedule, **SETTINGS).fit(images)
    model.layer.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"TRAK: the model has changed since fit \(model was .*\); fit again"):
        fitted.scores(images)


def test_a_parameter_frozen_since_fit_is_refused(linear_net, schedule, images):
    """The gradients of the others would meet other columns of the projection, and nothing would show it."""
    model = linear_net(4)
    fitted = TRAK(model, schedule, **SETTINGS).fit(images)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"TRAK: the model has changed since fit \(frozen"):
        fitted.scores(images)


def test_scores_before_fit(linear_net, schedule, images):
    with pytest.raises(RuntimeError, match="DTRAK: fit must be called before scores"):
        DTRAK(linear_net(4), schedule).scores(images)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), [1.0, 0.0]])
def test_lambda_must_be_positive(linear_net, schedule, images, value):
    with pytest.raises(ValueError, match="TRAK: lambda_ must be positive and finite, got"):
        TRAK(linear_net(4), schedule, lambda_=value)


@pytest.mark.parametrize(
    "given",
    [5, 5.0, np.float32(5), np.array(5.0), torch.tensor(5), [5], (v for v in [5.0, 1e9]), torch.tensor([5.0, 1e9])],
    ids=lambda given: type(given).__name__,
)
def test_lambda_is_a_number_or_a_grid_of_any_kind(linear_net, schedule, images, given):
    fitted = TRAK(linear_net(4), schedule, **{**SETTINGS, "lambda_": given}).fit(images)
    assert fitted.lambda_ == 5 and type(fitted.lambda_) is float


@pytest.mark.parametrize("given", [[], (), (v for v in ()), torch.empty(0)], ids=lambda given: type(given).__name__)
def test_an_empty_grid_is_refused(linear_net, schedule, given):
    with pytest.raises(ValueError, match="TRAK: lambda_ must be a number or a grid of some, got an empty grid"):
        TRAK(linear_net(4), schedule, lambda_=given)


def test_scores_take_one_lambda(linear_net, schedule, images):
    fitted = TRAK(linear_net(4), schedule, **SETTINGS).fit(images)
    assert torch.equal(fitted.scores(images, lambda_=np.float32(2)), fitted.scores(images, lambda_=2.0))
    with pytest.raises(ValueError, match="lambda_ must be one number here, got 2"):
        fitted.scores(images, lambda_=[1.0, 2.0])


def test_memory_changes_rounding_only(linear_net, schedule, images):
    scores = [TRAK(linear_net(4), schedule, **SETTINGS, memory=m).fit(images).scores(images) for m in (4000, 1 << 30)]
    torch.testing.assert_close(*scores)
    with pytest.raises(ValueError, match=r"memory must be at least [0-9]+ bytes for one sample, got 10"):
        TRAK(linear_net(4), schedule, **SETTINGS, memory=10).fit(images)


def test_features_that_are_all_zero_say_so(linear_net, schedule, images):
    model = linear_net(4)
    model.layer.weight.data.zero_()  # the squared prediction is at its minimum
    with pytest.raises(ValueError, match="every feature of the training images is zero"):
        DTRAK(model, schedule, num_timesteps=2, proj_dim=8).fit(images)


def test_float32_solves(linear_net, schedule, images):
    model, queries = linear_net(4), images[:3]
    exact, single = (
        TRAK(model, schedule, solve_dtype=d, **SETTINGS).fit(images) for d in (torch.float64, torch.float32)
    )
    assert not torch.equal(exact.scores(queries), single.scores(queries))
    torch.testing.assert_close(single.scores(queries), exact.scores(queries), atol=1e-3, rtol=1e-3)
    for (_, theirs), (_, ours) in zip(
        exact.scores_grid(queries, [1.0, 30.0]), single.scores_grid(queries, [1.0, 30.0]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    with pytest.raises(
        ValueError, match=r"TRAK: solve_dtype must be torch.float32 or torch.float64, got torch.float16"
    ):
        TRAK(model, schedule, solve_dtype=torch.float16)
