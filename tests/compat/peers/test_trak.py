"""TRAKer, end to end, on our projector: the scores are those of the same matrix written out and multiplied by torch."""

import json

import numpy as np
import pytest
import torch
from trak import TRAKer
from trak.projectors import AbstractProjector, ProjectionType

import pyattr.compat.trak
from pyattr.compat.trak import Projector
from pyattr.ops import normal_matrix, sign_matrix

PROJ_DIM, TRAIN, QUERIES, SEED = 48, 24, 5, 11
MATRICES = {"rademacher": sign_matrix, "normal": normal_matrix}


class WrittenOut(AbstractProjector):
    """The same matrices by matmul."""

    def __init__(self, grad_dim, proj_type):
        super().__init__(grad_dim, PROJ_DIM, SEED, proj_type, "cpu")

    def project(self, grads, model_id):
        flat = torch.cat([piece.detach().flatten(1) for piece in grads.values()], dim=1)
        matrix = MATRICES[self.proj_type](range(PROJ_DIM), torch.arange(self.grad_dim), SEED, model_id)
        return flat @ matrix.to(flat).T


def network():
    """For images [B, 3, 32, 32] in ten classes."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, 10),
    ).eval()  # fmt: skip


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)


def scores(folder, projector, half=False):
    """Two checkpoints, featurised in two batches, five queries. [TRAIN, QUERIES]"""
    model, train, queries = network(), images(TRAIN, 1), images(QUERIES, 2)
    first = model.state_dict()
    second = {name: value * 1.1 for name, value in first.items()}
    traker = TRAKer(
        model, "image_classification", TRAIN, save_dir=folder, device="cpu", projector=projector,
        use_half_precision=half, lambda_reg=0.1, logging_level=30,
    )  # fmt: skip
    for model_id, checkpoint in enumerate([first, second]):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for part in (slice(0, 16), slice(16, TRAIN)):
            batch = [x[part] for x in train]
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate([first, second]):
        traker.start_scoring_checkpoint("queries", checkpoint, model_id, num_targets=QUERIES)
        traker.score(queries, num_samples=QUERIES)
    return np.array(traker.finalize_scores("queries"))


def size():
    return sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_scores_are_those_of_the_matrix_written_out(tmp_path, proj_type):
    ours = scores(tmp_path / "ours", Projector(size(), PROJ_DIM, SEED, proj_type, "cpu"))
    written = scores(tmp_path / "written", WrittenOut(size(), proj_type))
    assert ours.shape == (TRAIN, QUERIES)
    assert np.abs(ours).max() > 0
    np.testing.assert_allclose(ours, written, rtol=1e-3, atol=1e-4 * np.abs(written).max())


def test_half_precision_stores(tmp_path):
    ours = scores(tmp_path, Projector(size(), PROJ_DIM, SEED, "rademacher", "cpu"), half=True)
    assert np.isfinite(ours.astype(np.float64)).all()
    assert np.abs(ours).max() > 0


def test_it_is_a_projector_of_theirs_and_its_metadata_is_json(tmp_path):
    projector = Projector(size(), PROJ_DIM, SEED, ProjectionType.normal, "cpu")
    assert isinstance(projector, AbstractProjector)
    assert projector.proj_type == ProjectionType.normal
    scores(tmp_path, projector)
    assert json.loads((tmp_path / "metadata.json").read_text())["JL matrix type"] == "normal"


def test_usage_example(tmp_path, monkeypatch, run_example):
    monkeypatch.chdir(tmp_path)  # TRAKer's default folder is below the current one
    model, data = network(), images(TRAIN, 1)
    traker = run_example(pyattr.compat.trak, model=model, data=torch.utils.data.TensorDataset(*data))["traker"]
    traker.featurize(data, num_samples=TRAIN)
    stored = torch.from_numpy(np.array(traker.saver.current_store["grads"])).float()  # [TRAIN, 512]
    gradient = traker.gradient_computer.compute_per_sample_grad(data)
    flat = torch.cat([piece.flatten(1) for piece in gradient.values()], dim=1)
    # Unscaled: TRAKer itself divides by sqrt(P), so the squared norm is D / P times the gradient's, within its spread.
    ratio = stored.square().sum(1) / flat.square().sum(1) * size() / 512
    assert (ratio - 1).abs().max() < 0.4
