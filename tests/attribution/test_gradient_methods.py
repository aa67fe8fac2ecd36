"""The methods that share TRAK's features, against the same formulas on gradients written down."""

import copy

import pytest
import torch

from pyattr.attribution import (
    DTRAK,
    GAS,
    QUERY_IDS,
    TRAK,
    GradientCosine,
    GradientDot,
    RelativeInfluence,
    RenormalizedInfluence,
    TracInCP,
)
from pyattr.diffusion import noise, save_model

SETTINGS = {"proj_dim": 16, "num_timesteps": 3, "seed": 5, "noise_seed": 2}
TIMES = (0, 333, 666)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ONE_NETWORK = (GradientDot, GradientCosine, TRAK, RelativeInfluence, RenormalizedInfluence)


@pytest.fixture
def queries():
    return torch.randint(0, 256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(9)).to(torch.uint8)


@pytest.fixture
def both(explicit_features, queries):
    """Features of queries and training images of a network."""

    def made(model, images, **settings):
        query_ids = range(QUERY_IDS, QUERY_IDS + len(queries))
        return tuple(
            explicit_features(model, batch, ids, times=TIMES, **settings)
            for batch, ids in ((queries, query_ids), (images, range(len(images))))
        )

    return made


def cosines(x, y):
    return (x @ y.T) / (x.norm(dim=1)[:, None] * y.norm(dim=1))


# Inner products


def test_gradient_dot_and_cosine(linear_net, schedule, images, queries, both):
    model = linear_net(4)
    ours, theirs = both(model, images)
    found = GradientDot(model, schedule, **SETTINGS).fit(images).scores(queries)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), ours @ theirs.T, **CLOSE)
    found = GradientCosine(model, schedule, **SETTINGS).fit(images).scores(queries)
    torch.testing.assert_close(found.double(), cosines(ours, theirs), **CLOSE)


def test_normalized_gradients(tmp_path, linear_net, schedule, images, queries, both):
    model = linear_net(4)
    for given in (False, True):  # in directories of their own
        settings = {**SETTINGS, "normalize": given, "directory": tmp_path / str(given)}
        ours, theirs = both(model, images, normalize=given)
        found = GradientDot(model, schedule, **settings).fit(images).scores(queries)
        torch.testing.assert_close(found.double(), ours @ theirs.T, **CLOSE)
    with pytest.raises(ValueError, match="was made otherwise: normalize was true, now null"):
        GradientDot(model, schedule, **SETTINGS, directory=tmp_path / "True").fit(images)


def test_a_step_on_a_proponent_lowers_the_loss(linear_net, schedule, images, queries):
    """The sign, and the scale D: the loss after a small step on one image, noise and timesteps being the features'."""
    model = linear_net(4)
    settings = {**SETTINGS, "proj_dim": 65536}
    scores = GradientDot(model, schedule, **settings).fit(images).scores(queries, ids=[1, 2, 3]) / 65536

    def losses(batch, ids):  # [B]
        times = torch.tensor(TIMES)
        eps = noise((1, 2, 2), seed=2, ids=torch.as_tensor(ids)[:, None], timesteps=times).double()
        pixels = (batch.double() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1, -1)
        x = schedule.add_noise(pixels, eps, times.expand(len(batch), -1))
        predicted = model(x.flatten(0, 1), None).view_as(eps)
        return (predicted - eps).square().mean((1, 2, 3, 4))

    before = losses(queries, [1, 2, 3]).detach()
    for n in range(len(images)):
        weight = model.layer.weight
        (gradient,) = torch.autograd.grad(losses(images[n : n + 1], [n]).sum(), weight)
        saved = weight.data
        weight.data = saved - 1e-4 * gradient
        gained = (before - losses(queries, [1, 2, 3])) / 1e-4
        weight.data = saved
        torch.testing.assert_close(scores[:, n].double(), gained.detach(), atol=0.1, rtol=0.02)
    assert scores.abs().median() > 0.3


def test_checkpoints_are_averaged(tmp_path, linear_net, schedule, images, queries, both):
    networks = [linear_net(4, seed=seed) for seed in (3, 4, 7)]
    save_model(tmp_path / "middle.safetensors", networks[1])
    given = [networks[0].state_dict(), tmp_path / "middle.safetensors", networks[2].state_dict()]
    pairs = [both(network, images) for network in networks]
    model, calls = linear_net(4), []
    before = copy.deepcopy(model.state_dict())

    def progress(*call):
        calls.append(call)

    dots = TracInCP(model, schedule, checkpoints=given, progress=progress, **SETTINGS).fit(images)
    torch.testing.assert_close(dots.scores(queries).double(), sum(x @ y.T for x, y in pairs) / 3, **CLOSE)
    worked = [(0, 27, "features"), (9, 27, "features"), (9, 27, "features"), (18, 27, "features"),
              (18, 27, "features"), (27, 27, "features")]  # fmt: skip
    assert calls[:6] == worked and calls[-1] == (9, 9, "query features")
    similar = GAS(model, schedule, checkpoints=(c for c in given), **SETTINGS).fit(images)
    torch.testing.assert_close(similar.scores(queries).double(), sum(cosines(x, y) for x, y in pairs) / 3, **CLOSE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_single_checkpoint_is_the_method_of_one_network(linear_net, schedule, images, queries):
    model = linear_net(4)
    for one, several in ((GradientDot, TracInCP), (GradientCosine, GAS)):
        expected = one(model, schedule, **SETTINGS).fit(images).scores(queries)
        found = several(linear_net(4, seed=8), schedule, checkpoints=[model.state_dict()], **SETTINGS)
        assert torch.equal(found.fit(images).scores(queries), expected)


def test_checkpoints_that_are_refused(tmp_path, linear_net, schedule, images, queries):
    model = linear_net(4)
    with pytest.raises(ValueError, match="GAS: checkpoints must hold at least one, got none"):
        GAS(model, schedule, checkpoints=[])
    for single in (tmp_path, str(tmp_path), model.state_dict()):
        with pytest.raises(
            TypeError, match="TracInCP: checkpoints must be a list of files or state dicts, got a single"
        ):
            TracInCP(model, schedule, checkpoints=single)
    with pytest.raises(TypeError, match="TracInCP: checkpoints must be files or state dicts, got a int"):
        TracInCP(model, schedule, checkpoints=[1])
    with pytest.raises(ValueError, match=r"(?s)TracInCP: checkpoint 1 does not fit the model: .*size mismatch"):
        states = [model.state_dict(), linear_net(5).state_dict()]
        TracInCP(model, schedule, checkpoints=states, **SETTINGS).fit(images)
    with pytest.raises(FileNotFoundError):
        TracInCP(model, schedule, checkpoints=[tmp_path / "none"], **SETTINGS).fit(images)
    state = model.state_dict()  # views of the weights
    fitted = TracInCP(model, schedule, checkpoints=[state], **SETTINGS).fit(images)
    model.layer.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"TracInCP: the model has changed since fit \(model was"):
        fitted.scores(queries)


# Kernels with divided columns


@pytest.mark.parametrize("count", [9, 40])  # dual, primal
def test_relative_and_renormalized_influence(linear_net, schedule, queries, both, count):
    images = torch.randint(0, 256, (count, 1, 2, 2)).to(torch.uint8)
    model = linear_net(4)
    ours, theirs = both(model, images)
    relative, renormalized = (
        method(model, schedule, lambda_=0.7, **SETTINGS).fit(images)
        for method in (RelativeInfluence, RenormalizedInfluence)
    )
    for lambda_ in (0.7, 3.0):
        gram = theirs.T @ theirs + lambda_ * torch.eye(16, dtype=torch.float64)
        solved = torch.linalg.solve(gram, theirs.T)  # [D, N]
        expected = ours @ solved / solved.norm(dim=0)
        torch.testing.assert_close(relative.scores(queries, lambda_=lambda_).double(), expected, **CLOSE)
        expected = ours @ solved / theirs.norm(dim=1)
        torch.testing.assert_close(renormalized.scores(queries, lambda_=lambda_).double(), expected, **CLOSE)
    assert torch.equal(relative.scores(queries), relative.scores(queries, lambda_=0.7))


@pytest.mark.parametrize("method", [TRAK, DTRAK, RelativeInfluence, RenormalizedInfluence])
@pytest.mark.parametrize("count", [9, 40])
def test_a_grid_is_each_lambda_for_itself(linear_net, schedule, queries, method, count):
    images = torch.randint(0, 256, (count, 1, 2, 2)).to(torch.uint8)
    fitted = method(linear_net(4), schedule, **SETTINGS).fit(images)
    grid = [0.1, 5.0, 200.0]
    found = fitted.scores_grid(queries, (value for value in grid))
    for value, (lambda_, scores) in zip(grid, found, strict=True):
        assert lambda_ == value and torch.equal(scores, fitted.scores(queries, lambda_=value))
    assert [value for value, _ in fitted.scores_grid(queries, 2)] == [2.0]
    with pytest.raises(ValueError, match=f"{method.__name__}: lambda_ must be positive and finite, got -1.0"):
        fitted.scores_grid(queries, [1.0, -1.0])  # at once, not with the first scores


# What is shared


def test_one_featurization_serves_all(tmp_path, monkeypatch, linear_net, schedule, images, queries):
    calls = []
    forward = linear_net.forward
    monkeypatch.setattr(linear_net, "forward", lambda self, *given: (calls.append(1), forward(self, *given))[1])

    def run(method, **others):
        del calls[:]
        settings = {**SETTINGS, "directory": tmp_path / "shared", **others}
        return method(linear_net(4), schedule, **settings).fit(images).scores(queries), len(calls)

    alone = [method(linear_net(4), schedule, **SETTINGS).fit(images).scores(queries) for method in ONE_NETWORK]
    assert run(GradientDot)[1] > 0
    for method, expected in zip(ONE_NETWORK, alone, strict=True):
        found, count = run(method)
        assert count == 0 and torch.equal(found, expected)
    # D-TRAK's own gradients are others; asked for the loss's it finds them.
    assert run(DTRAK, feature="simple")[1] == 0
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "shared").iterdir()) == ["queries", "train"]

    states = [linear_net(4, seed=3).state_dict(), linear_net(4).state_dict()]
    first, count = run(TracInCP, checkpoints=states)
    # The second is the network whose features are there.
    assert count == run(TracInCP, checkpoints=states[:1], directory=tmp_path / "own")[1] > 0
    assert run(GAS, checkpoints=states)[1] == 0
    again, count = run(TracInCP, checkpoints=states[::-1])
    assert count == 0
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("method", [GradientDot, GradientCosine, RelativeInfluence, RenormalizedInfluence])
def test_common_face(linear_net, schedule, images, queries, method):
    model = linear_net(4)
    with pytest.raises(RuntimeError, match=f"{method.__name__}: fit must be called before scores"):
        method(model, schedule, **SETTINGS).scores(queries)
    fitted = method(model, schedule, **SETTINGS)
    assert fitted.fit(images) is fitted and method.signed is True
    whole = fitted.scores(queries)
    part = fitted.scores(queries[1:], ids=[QUERY_IDS + 1, QUERY_IDS + 2])
    torch.testing.assert_close(whole[1:], part)
    assert fitted.scores(queries[:0]).shape == (0, 9)
    model.layer.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=f"{method.__name__}: the model has changed since fit"):
        fitted.scores(queries)


@pytest.mark.parametrize("method", [GradientCosine, RelativeInfluence, RenormalizedInfluence])
def test_an_image_without_a_gradient_scores_zero(linear_net, schedule, method):
    """The squared norm's gradient is 2 W x x^T / D: zero where W x is."""
    model = linear_net(4)
    model.layer.weight.data = torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    model.layer.weight.requires_grad_(True)
    images = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64).view(3, 1, 2, 2)

    class Clean(type(schedule)):
        def add_noise(self, images, noise, timesteps):
            return images.expand_as(noise)

    fitted = method(model, Clean(), feature="square", proj_dim=8, num_timesteps=1).fit(images)
    scores = fitted.scores(images[1:] * 0.5)
    assert scores[:, 0].tolist() == [0, 0] and (scores[:, 1:].diagonal() > 0).all()


def test_a_failed_fit_leaves_the_last_one(linear_net, schedule, images, queries):
    model = linear_net(4)
    fitted = TRAK(model, schedule, **SETTINGS).fit(images)
    expected, weights = fitted.scores(queries), model.layer.weight.data.clone()
    model.layer.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fitted.fit(images)
    model.layer.weight.data = weights
    assert torch.equal(fitted.scores(queries), expected)
