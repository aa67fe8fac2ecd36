"""The benchmark of the linear datamodeling score: what is drawn, trained and committed."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.lds import build, problem
from bench.lds.problem import PROBLEMS
from pyattr.diffusion import load_model
from pyattr.diffusion.progress import silent

NAMES = sorted(PROBLEMS)


@pytest.fixture
def digits(tmp_path):
    """An archive of 28 x 28 images in which each class has a grey value of its own."""
    rng, found = np.random.default_rng(0), {}
    for part, count in (("train", 3000), ("test", 300)):
        labels = rng.integers(0, 10, count)
        found[f"{part}_labels"] = labels.astype(np.uint8)
        found[f"{part}_images"] = np.repeat(20 * labels + 7, 784).reshape(count, 28, 28).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", **found)
    return tmp_path / "digits.npz"


def test_images_are_drawn_in_equal_parts_with_their_labels(digits):
    drawn = PROBLEMS["mnist"].draw(digits)
    for part, count in (("train", 1000), ("validation", 100)):
        images, labels = drawn[f"{part}_images"], drawn[f"{part}_labels"]
        assert images.shape == (count, 1, 16, 16) and images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count // 10] * 10
        # The middle is the class's grey, the margin of one pixel (two of 32, halved) black.
        assert (images[:, 0, 1:-1, 1:-1] == (20 * labels + 7)[:, None, None]).all()
        assert not images[:, :, [0, -1]].any() and not images[:, :, :, [0, -1]].any()


def test_pixels_are_means_of_two_by_two():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 2:4, 4:6, 1] = [[1, 2], [3, 200]]
    small = problem._small(images)
    assert small[0, 1, 1, 2] == round((1 + 2 + 3 + 200) / 4)
    assert small.sum() == small[0, 1, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_those_that_workers_can_import(name):
    torch.manual_seed(0)
    ours = PROBLEMS[name].network()
    torch.manual_seed(0)
    theirs = (problem.coloured if PROBLEMS[name].channels == 3 else problem.grey)()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.zeros(2, PROBLEMS[name].channels, 16, 16)
    assert ours(x, torch.tensor([0, 999])).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_generated_queries_come_from_the_committed_network(name):
    made = build.sampled(PROBLEMS[name], "noise", silent).images[:4]
    found = build.images(PROBLEMS[name])["generated_images"][:4]
    bytes_made = ((made.clamp(-1, 1) + 1) * 127.5).round()
    # Sampling amplifies rounding; another processor may move a pixel by a step or two.
    assert (bytes_made - torch.from_numpy(found).float()).abs().mean() < 1


def test_everything_is_made_and_goes_on(digits, tmp_path, monkeypatch):
    """The whole of it in small: few images, few steps."""
    monkeypatch.setattr(problem, "HERE", tmp_path)
    for name, value in (
        ("IMAGES", 20),
        ("VALIDATION", 10),
        ("GENERATED", 3),
        ("FULL_STEPS", 8),
        ("SUBSET_STEPS", 2),
        ("TIMESTEPS", 2),
        ("POOL", 4),
    ):
        monkeypatch.setattr(problem, name, value)
    small = dataclasses.replace(PROBLEMS["mnist"], models=3)
    build.draw(small, digits)
    build.main_model(small, tmp_path / "work", silent)
    assert [path.name for path in build.main_checkpoints(small)] == [
        f"main-{step:04d}.safetensors" for step in (2, 4, 6, 8)
    ]
    assert build.queries(small).shape == (13, 1, 16, 16)
    truth = build.retrain(small, "evaluation", tmp_path / "work", 1, silent)
    assert truth.losses.shape == (5, 3, 1, 1, 13)
    pool = build.retrain(small, "retraining", tmp_path / "work", 1, silent)
    assert pool.masks.shape == (4, 20) and not np.array_equal(pool.masks[:3], truth.masks)
    half = load_model(small.folder / "models" / "half-3.safetensors")
    kept = load_model(tmp_path / "work" / "retraining" / "models" / "model-0003-00.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), kept.parameters(), strict=True))
    before = (small.folder / "evaluation.safetensors").read_bytes()
    build.retrain(small, "evaluation", tmp_path / "work", 1, silent)
    assert (small.folder / "evaluation.safetensors").read_bytes() == before
