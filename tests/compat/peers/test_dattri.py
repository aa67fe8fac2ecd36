"""dattri's attributors with our random_project, against themselves with a matrix written out."""

import dattri.algorithm.tracin
import dattri.algorithm.trak
import pytest
import torch
from dattri.algorithm import TracInAttributor, TRAKAttributor
from dattri.func.projection import AbstractProjector, ProjectionType
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

from pyattr import ops
from pyattr.compat import dattri as ours

WIDTH, OUTPUTS, SEED = 12 * 7 + 7 + 7 * 3 + 3, 16, 5


@pytest.fixture
def problem():
    """A small network, two checkpoints of it, and data: (task, train, test)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    checkpoints = [
        {name: parameter.detach() + 0.3 * torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        for _ in range(2)
    ]

    def loss(parameters, sample):
        x, label = sample
        logits = torch.func.functional_call(model, parameters, x[None])
        return torch.nn.functional.cross_entropy(logits, label[None])

    def loader(rows):
        return DataLoader(TensorDataset(torch.randn(rows, 12), torch.randint(0, 3, (rows,))), batch_size=4)

    return AttributionTask(loss_func=loss, model=model, checkpoints=checkpoints), loader(30), loader(6), loss


def written_out(matrices):
    """A random_project with a matrix [P, D] for each ensemble member."""

    def random_project(feature, feature_batch_size, proj_dim, proj_max_batch_size, **options):
        return lambda feature, ensemble_id=0: feature @ matrices[ensemble_id]

    return random_project


def matrices(proj_type):
    """That of each of the two checkpoints, by projecting the identity: its rows are those of the matrix."""
    projector = ours.BasicProjector(WIDTH, OUTPUTS, SEED, proj_type, "cpu")
    return [projector.project(torch.eye(WIDTH), member) for member in (0, 1)]


def settings(proj_type):
    return {
        "projector_kwargs": {
            "proj_dim": OUTPUTS, "proj_max_batch_size": 8, "proj_seed": SEED, "proj_type": proj_type, "device": "cpu"
        },
        "device": torch.device("cpu"),
    }  # fmt: skip


def trak(problem, proj_type):
    task, train, test, loss = problem

    def correct_probability(parameters, sample):
        return torch.exp(-loss(parameters, sample))

    attributor = TRAKAttributor(
        task=task, correct_probability_func=correct_probability, regularization=1e-3, **settings(proj_type)
    )
    attributor.cache(train)
    return attributor.attribute(test)


def test_trak_with_the_sign_matrix_written_out(problem, monkeypatch):
    members = [ops.sign_matrix(range(OUTPUTS), range(WIDTH), SEED + 100_000 * member) for member in (0, 1)]
    signs = [member.T / OUTPUTS**0.5 for member in members]
    monkeypatch.setattr(dattri.algorithm.trak, "random_project", written_out(signs))
    expected = trak(problem, "rademacher")
    monkeypatch.setattr(dattri.algorithm.trak, "random_project", ours.random_project)
    scores = trak(problem, "rademacher")
    assert scores.shape == (30, 6)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("proj_type", ["normal", "random_mask", "sjlt", "grass"])
def test_trak(problem, proj_type, monkeypatch):
    monkeypatch.setattr(dattri.algorithm.trak, "random_project", written_out(matrices(proj_type)))
    expected = trak(problem, proj_type)
    monkeypatch.setattr(dattri.algorithm.trak, "random_project", ours.random_project)
    scores = trak(problem, proj_type)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("proj_type", ["identity", "normal", "rademacher", "random_mask", "sjlt", "grass_2"])
def test_tracin(problem, proj_type, monkeypatch):
    task, train, test, _ = problem
    arguments = {"task": task, "weight_list": torch.ones(2), "normalized_grad": True, **settings(proj_type)}
    monkeypatch.setattr(dattri.algorithm.tracin, "random_project", written_out(matrices(proj_type)))
    expected = TracInAttributor(**arguments).attribute(train, test)
    monkeypatch.setattr(dattri.algorithm.tracin, "random_project", ours.random_project)
    torch.testing.assert_close(TracInAttributor(**arguments).attribute(train, test), expected, rtol=1e-4, atol=1e-5)


def test_usage_example(problem, run_example, monkeypatch):
    monkeypatch.setattr(dattri.algorithm.trak, "random_project", dattri.algorithm.trak.random_project)  # put back after
    features = run_example(ours)["features"]
    assert features.shape == (8, 512)
    assert dattri.algorithm.trak.random_project is ours.random_project
    assert trak(problem, "sjlt").isfinite().all()  # which dattri's own refuses on the CPU


def test_base_class_and_types():
    for kind in (ours.BasicProjector, ours.CudaProjector):
        projector = kind(WIDTH, OUTPUTS, SEED, ProjectionType.sjlt, torch.device("cpu"))
        assert isinstance(projector, AbstractProjector)
        assert projector.proj_type is ProjectionType.sjlt
