"""Subsets, and the record of losses under models trained on them."""

import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from pyattr.diffusion import DamagedFileError, Samples
from pyattr.diffusion.storage import data_hash, save_tensors
from pyattr.evaluation import GroundTruth, subsets
from pyattr.evaluation.ground_truth import image_hashes

IMAGES = torch.arange(4 * 4, dtype=torch.uint8).reshape(4, 1, 2, 2)
QUERIES = 100 + torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)


def truth(**changes):
    losses = np.random.default_rng(0).random((2, 5, 2, 3, 3))
    given = {
        "masks": subsets(4, 5),
        "losses": losses,
        "targets": ("simple", "elbo"),
        "query_ids": np.array([7, 8, 1 << 40]),
        "images": data_hash(IMAGES),
        "queries": tuple(image_hashes(QUERIES)),
        "settings": {"steps": 3, "model": None},
    }
    return GroundTruth(**{**given, **changes})


def test_outputs_average_models_and_noise():
    made = truth()
    for f, target in enumerate(made.targets):
        expected = np.zeros((5, 3))
        for s in range(2):
            for e in range(3):
                expected += made.losses[f, :, s, e] / 6
        np.testing.assert_allclose(made.outputs(target), expected, rtol=1e-14)
    np.testing.assert_array_equal(made.outputs(), made.outputs("simple"))
    with pytest.raises(ValueError, match="GroundTruth: target must be one of simple, elbo, got 'l2'"):
        made.outputs("l2")


@pytest.mark.parametrize("changes", [{}, {"images": None, "queries": None}])
def test_a_file_gives_back_what_was_saved(tmp_path, changes):
    made = truth(**changes)
    made.save(tmp_path / "truth.safetensors")
    again = GroundTruth.open(tmp_path / "truth.safetensors")
    for name in ("masks", "losses", "query_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
        assert getattr(again, name).dtype == getattr(made, name).dtype
    for name in ("targets", "images", "queries", "settings"):
        assert getattr(again, name) == getattr(made, name)
    assert [path.name for path in tmp_path.iterdir()] == ["truth.safetensors"]


def test_files_that_are_damaged_or_something_else(tmp_path):
    path = tmp_path / "truth.safetensors"
    truth().save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="is damaged"):
        GroundTruth.open(path)
    path.write_bytes(content[:100])
    with pytest.raises(DamagedFileError, match="is damaged"):
        GroundTruth.open(path)
    save_tensors(path, {"masks": torch.zeros(1)}, {"kind": "model"})
    with pytest.raises(ValueError, match="does not hold a ground truth: it is a file of kind 'model'"):
        GroundTruth.open(path)
    with pytest.raises(FileNotFoundError):
        GroundTruth.open(tmp_path / "none")


def test_queries_are_found_by_their_pixels():
    twice = QUERIES[[0, 1, 0]]
    made = truth(queries=tuple(image_hashes(twice)))
    np.testing.assert_array_equal(made.rows(twice, "op"), [0, 1, 2])  # those that are equal in their order
    np.testing.assert_array_equal(made.rows(QUERIES[[1, 0]].numpy(), "op"), [1, 0])
    samples = Samples(QUERIES[:1], torch.arange(1), QUERIES[:1, None].float(), None, torch.arange(1), {})
    np.testing.assert_array_equal(made.rows(samples, "op"), [0])
    with pytest.raises(
        ValueError, match="op: queries must be among those of the ground truth, in their dtype; number 2 is not"
    ):
        made.rows(QUERIES[[0, 0, 0]], "op")
    with pytest.raises(ValueError, match="number 0 is not"):
        made.rows(QUERIES.float() / 255, "op")
    with pytest.raises(ValueError, match="op: the ground truth must say which queries it has the losses of"):
        truth(queries=None).rows(QUERIES, "op")


def test_training_images_are_checked():
    truth().check_images(IMAGES, "op")
    truth(images=None).check_images(IMAGES.flip(0), "op")
    with pytest.raises(
        ValueError, match="op: train must be the images of the ground truth, in their order and dtype, got others"
    ):
        truth().check_images(IMAGES.flip(0), "op")
    with pytest.raises(ValueError, match="op: train must be the 4 images of the ground truth, got 3"):
        truth(images=None).check_images(IMAGES[:3], "op")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": np.ones((5, 4))}, r"masks must be bool of shape \[M, N\], got float64, \[5, 4\]"),
        (
            {"targets": ("simple",)},
            r"losses must have shape \[F, M, S, E, Q\] with F = 1 and M = 5, got \[2, 5, 2, 3, 3\]",
        ),
        ({"query_ids": np.arange(2)}, "query_ids must be as many as losses, 3, got 2"),
        ({"queries": ("a",)}, "queries must be as many as losses, 3, got 1"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"GroundTruth: {message}"):
        truth(**changes)


@hypothesis.given(
    st.integers(2, 40), st.integers(0, 6), st.sampled_from([0.5, 0.3, 0.75]), st.integers(1, 4), st.data()
)
def test_subsets_keep_the_share_of_each_class(images, count, fraction, classes, data):
    hypothesis.assume(int(fraction * images) >= 1)
    labels = np.array(data.draw(st.lists(st.integers(0, classes), min_size=images, max_size=images)))
    made = subsets(images, count, fraction=fraction, labels=labels, seed=3)
    assert made.shape == (count, images) and made.dtype == bool
    assert (made.sum(1) == int(fraction * images)).all()
    exact = int(fraction * images) / images
    for label in set(labels.tolist()):
        held = made[:, labels == label].sum(1)
        assert (np.abs(held - exact * (labels == label).sum()) < 1).all()


def test_subsets_are_uniform_and_independent():
    made = subsets(10, 1500)
    assert (made.sum(1) == 5).all()
    # Without replacement: an image is in half of them, a pair in 5 * 4 / (10 * 9).
    together = made.T.astype(float) @ made / 1500
    np.testing.assert_allclose(np.diag(together), 0.5, atol=0.05)
    np.testing.assert_allclose(together[~np.eye(10, dtype=bool)], 2 / 9, atol=0.05)
    labelled = subsets(10, 1500, labels=[0] * 3 + [1] * 7)
    np.testing.assert_allclose(labelled.mean(0), 0.5, atol=0.05)  # 1.5 of 3 images and 3.5 of 7: by turns


def test_subsets_depend_on_what_they_should():
    made = subsets(20, 8, seed=5)
    np.testing.assert_array_equal(subsets(20, 12, seed=5)[:8], made)
    assert len({mask.tobytes() for mask in made}) == 8
    others = [subsets(20, 8, seed=6), subsets(20, 8, seed=5, pool="retraining")]
    for other in others:
        assert not {mask.tobytes() for mask in made} & {mask.tobytes() for mask in other}


def test_the_first_subsets():
    """Pinned, since committed ground truth is checked against them."""
    found = ["".join(map(str, mask.astype(int))) for mask in subsets(12, 3, seed=1)]
    assert found == [
        "100001011101",
        "100010011110",
        "101110000101",
    ]


@pytest.mark.parametrize("labels", [None, [0, 1] * 10])
def test_the_published_subsets(labels):
    for pool, first in (("evaluation", 42), ("retraining", 554)):
        made = subsets(20, 3, labels=labels, pool=pool, official=True)
        for k in range(3):
            kept, _ = train_test_split(list(range(20)), train_size=0.5, stratify=labels, random_state=first + 2 * k)
            assert set(np.flatnonzero(made[k])) == set(kept)


def test_published_subsets_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match=r"subsets: official=True needs scikit-learn: install pyattr\[evaluation\]"):
        subsets(4, 1, official=True)
    assert subsets(4, 1).sum() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0}, "fraction of num_images must leave a part of them, got 0 of 8 images"),
        ({"fraction": 1.0}, "fraction of num_images must leave a part of them, got 1.0 of 8 images"),
        ({"fraction": 0.1}, "fraction of num_images must leave a part of them, got 0.1 of 8 images"),
        ({"count": -1}, "count must not be negative, and at most 256 if official, got -1"),
        ({"count": 257, "official": True}, "count must not be negative, and at most 256 if official, got 257"),
        ({"pool": "test"}, "pool must be one of evaluation, retraining, got 'test'"),
        ({"seed": 2**32}, r"seed must lie in \[0, 4294967295\], and be 0 if official, got 4294967296"),
        ({"seed": 1, "official": True}, r"seed must lie in \[0, 4294967295\], and be 0 if official, got 1"),
        ({"labels": [1, 2]}, r"labels must have shape \[8\], got \[2\]"),
    ],
)
def test_refusals_of_subsets(arguments, message):
    with pytest.raises(ValueError, match=f"subsets: {message}"):
        subsets(**{"num_images": 8, "count": 2, **arguments})
