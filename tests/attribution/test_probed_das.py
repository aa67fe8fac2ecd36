"""DAS over all numbers of a prediction, against retrained linear models and gradients by autograd."""

import pytest
import torch

from pyattr.attribution import QUERY_IDS, ProbedDAS
from pyattr.attribution.probed_das import ProbeMap
from pyattr.diffusion import features, noise
from pyattr.diffusion.noise import PROBES
from pyattr.ops import sign_matrix

SETTINGS = {"proj_dim": 64, "num_timesteps": 1, "strategy": "midpoint", "seed": 5, "noise_seed": 2}


def rows(schedule, images, ids):  # [B, 4] twice
    eps = noise((1, 2, 2), seed=2, ids=torch.as_tensor(ids), timesteps=500).double()
    return schedule.add_noise(images, eps, torch.full((len(images),), 500)).flatten(1), eps.flatten(1)


@pytest.mark.parametrize("dim", [64, 256])  # fewer columns than training images times directions, and more
def test_the_change_of_all_numbers_by_leaving_an_image_out(linear_net, schedule, dim):
    """e = W x: least squares solved again without each image. The step has no leverage: (1 - h_n) times the change."""
    generator = torch.Generator().manual_seed(4)
    images, queries = torch.rand(2, 30, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    queries = queries[:3]
    x, eps = rows(schedule, images, range(30))
    x_q, _ = rows(schedule, queries, range(QUERY_IDS, QUERY_IDS + 3))
    everyone = torch.arange(30)

    def solve(keep):
        return torch.linalg.solve(x[keep].T @ x[keep], x[keep].T @ eps[keep]).T  # W

    model = linear_net(4)
    model.layer.weight.data = solve(everyone)
    change = torch.stack([(solve(everyone[everyone != n]) - solve(everyone)) @ x_q.T for n in range(30)])  # [N, 4, Q]
    leverage = torch.linalg.vecdot(x @ torch.linalg.inv(x.T @ x), x)
    expected = (change.square().mean(1) * (1 - leverage[:, None]) ** 2).T
    settings = {**SETTINGS, "proj_dim": dim, "lambda_": 1e-6, "probes": 4, "train_probes": 4}
    fitted = ProbedDAS(model, schedule, **settings).fit(images)
    assert fitted._kernel.dual == (dim > 120) and fitted.signed is False
    found = fitted.scores(queries).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    # Half of the directions estimate the same.
    half = ProbedDAS(model, schedule, **{**settings, "probes": 2}).fit(images).scores(queries).double()
    assert not torch.allclose(half, expected, rtol=0.01) and 0.3 < float(half.sum() / expected.sum()) < 3


def test_features_of_directions_by_autograd(linear_net, schedule, images):
    model, ids = linear_net(4), torch.tensor([3, 8])
    which = ProbeMap(schedule, num_timesteps=2, num_noises=2, proj_dim=16, seed=5, noise_seed=2, probe=1)
    got = features.compute(model, images[:2], which, ids=ids).tensor()
    signs = sign_matrix(range(16), range(16), 5).double()
    alternating = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)  # row 1 of Hadamard's matrix
    for image, i, row in zip(images, ids.tolist(), got, strict=False):
        total = 0
        for t in (0, 500):
            for draw in range(2):
                at = {"seed": 2, "ids": i, "timesteps": t, "draws": draw}
                x = schedule.add_noise(
                    (image.double() / 127.5 - 1)[None], noise((1, 1, 2, 2), **at).double(), torch.tensor([t])
                )
                direction = noise((4,), **at, purpose=PROBES).double().sign() * alternating
                total = total + (model(x, None).flatten() * direction).sum()
        (gradient,) = torch.autograd.grad(total, model.layer.weight)
        torch.testing.assert_close(row, signs @ gradient.flatten() / (4 * 4) ** 0.5, rtol=1e-9, atol=1e-9)


def test_directions_are_complete_and_independent_between_rows(schedule):
    def of(probe):
        which = ProbeMap(schedule, num_timesteps=2, probe=probe)
        return which._rows(torch.zeros(2, 1, 1, 2, 3), torch.tensor([0, 1]), slice(None))["noise"].flatten(2)

    directions = torch.stack([of(probe) for probe in range(8)])  # [8, 2, 2, 6]: 8 is the next power of two
    assert (directions.abs() == 1).all()
    moments = torch.einsum("mbri,mbrj->brij", directions, directions)
    assert torch.equal(moments, 8 * torch.eye(6).expand(2, 2, 6, 6))
    large = (
        ProbeMap(schedule, num_timesteps=2)
        ._rows(torch.zeros(2, 1, 1, 64, 64), torch.tensor([0, 1]), slice(None))["noise"]
        .flatten(2)
        .flatten(0, 1)
    )
    correlations = (large @ large.T / 4096).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 4096**0.5


def test_common_face(tmp_path, linear_net, schedule, images):
    calls = []
    settings = {**SETTINGS, "directory": tmp_path, "progress": lambda *call: calls.append(call)}
    fitted = ProbedDAS(linear_net(4), schedule, probes=2, **settings).fit(images)
    found = fitted.scores(images[:2])
    assert found.shape == (2, 9) and found.dtype == torch.float32 and (found >= 0).all()
    assert [call[:2] for call in calls if call[2] == "query features"][-1] == (4, 4)
    again = ProbedDAS(linear_net(4), schedule, probes=2, **settings).fit(images)
    assert torch.equal(again.scores(images[:2]), found)
    assert fitted.scores(images[:0]).shape == (0, 9)
    for lambda_, scores in fitted.scores_grid(images[:2], [0.1, 9.0]):
        assert torch.equal(scores, fitted.scores(images[:2], lambda_=lambda_))
    fitted.model.layer.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="ProbedDAS: the model has changed since fit"):
        fitted.scores(images[:2])


def test_what_is_refused(linear_net, schedule, images):
    model = linear_net(4)
    with pytest.raises(RuntimeError, match="ProbedDAS: fit must be called before scores"):
        ProbedDAS(model, schedule).scores(images)
    for name in ("probes", "train_probes"):
        with pytest.raises(ValueError, match=f"ProbedDAS: {name} must be at least 1, got 0"):
            ProbedDAS(model, schedule, **{name: 0})
    with pytest.raises(ValueError, match="ProbedDAS: normalize must be False"):
        ProbedDAS(model, schedule, normalize=True)
    with pytest.raises(ValueError, match=r"ProbedDAS: solve_dtype must be torch\.float64, got torch\.float32"):
        ProbedDAS(model, schedule, solve_dtype=torch.float32)
