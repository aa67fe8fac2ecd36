"""How the experiments with encoded ensembles read digits and write results."""

import json

import numpy as np
import pytest
import torch

from bench.experiments import encoded_digits
from pyattr.evaluation import compare, share


def test_results_as_json(tmp_path):
    found = {
        "share": share([True, False, False, False]),
        "test": compare([3.0, 4.0], [1.0, 2.0], alternative="greater"),
        "array": np.array([[1.23456789, np.nan]]),
        "counts": np.arange(3),
        "number": np.float32(2.0),
        "words": "as they are",
    }
    encoded_digits.write_json(tmp_path / "x.json", found)
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["share"]["percent"] == 25 and read["share"]["of"] == 4
    assert read["test"] == {"p": pytest.approx(1 / 6, rel=1e-4), "effect": 1, "counts": [2, 2]}
    assert (read["array"], read["counts"], read["number"]) == ([[1.2346, None]], [0, 1, 2], 2.0)
    assert read["words"] == "as they are"


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


def test_pixels():
    images = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert encoded_digits.as_bytes(images).tolist() == [0, 0, 128, 255, 255, 255]


def test_the_schedule_ends_in_noise():
    assert encoded_digits.SCHEDULE.alphas_cumprod[-1] < 4.1e-5
