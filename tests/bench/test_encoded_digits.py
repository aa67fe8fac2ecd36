"""How the experiments with encoded ensembles read digits."""

import numpy as np
import pytest

from bench.experiments import encoded_digits


def test_digits(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("test", 3), ("train", 5)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, count).astype(np.uint8)
    np.savez(tmp_path / "x.npz", **arrays)
    ours, others = encoded_digits.digits(tmp_path / "x.npz")
    np.testing.assert_array_equal(ours[0][:, 0], arrays["test_images"])
    np.testing.assert_array_equal(others[1], arrays["train_labels"])
    assert ours[0].shape == (3, 1, 28, 28) and ours[1].dtype == np.int64


def test_an_archive_of_other_names(tmp_path):
    np.savez(tmp_path / "x.npz", test_images=np.zeros((1, 28, 28), np.uint8), x_train=[0])
    wanted = r"^--data must hold test_images, test_labels, train_images, train_labels, got .*x.npz with test_images, x_train$"
    with pytest.raises(ValueError, match=wanted):
        encoded_digits.digits(tmp_path / "x.npz")


def test_the_schedule_ends_in_noise():
    assert encoded_digits.SCHEDULE.alphas_cumprod[-1] < 4.1e-5
