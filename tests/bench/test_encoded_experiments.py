"""The experiments with encoded ensembles from end to end, on noise of 8 x 8 pixels and members of two convolutions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.experiments import encoded_classes, encoded_digits, encoded_items, encoded_tables
from pyattr.diffusion import Schedule
from pyattr.report.numbers import numbers, write_results


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, images, timesteps):
        return self.last(torch.tanh(self.first(images))) + 0.5 * images


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_digits, "NETWORK", Net)
    monkeypatch.setattr(encoded_digits, "SCHEDULE", Schedule(6, 1e-2, 0.5))
    monkeypatch.setattr(encoded_digits, "EPOCHS", 1)
    for name, value in {"MEMBERS": 5, "ITEMS": 4, "SETTLING": 2, "TOP": 3}.items():
        monkeypatch.setattr(encoded_items, name, value)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, labels in (("test", np.arange(10)), ("train", np.arange(40) % 10)):
        arrays[f"{part}_labels"] = labels
        arrays[f"{part}_images"] = rng.integers(0, 256, (len(labels), 8, 8), np.uint8)
    np.savez(tmp_path / "digits.npz", **arrays)
    found = SimpleNamespace(
        out=tmp_path / "out", work=tmp_path / "work", data=tmp_path / "digits.npz", samples=6, steps=2, workers=1
    )
    found.out.mkdir()
    found.work.mkdir()
    return found


@pytest.mark.parametrize(
    ("experiment", "table", "pictures"),
    [
        (encoded_classes, "classes", ["", "_plane"]),
        (encoded_items, "items", ["", "_top"]),
    ],
)
def test_an_experiment_from_end_to_end(args, experiment, table, pictures):
    found = experiment.run(args)
    assert found["settings"].pop("network") is Net
    write_results(args.out / f"encoded_{table}.json", found)
    for ending in pictures:
        with Image.open(args.out / f"encoded_{table}{ending}.png") as picture:
            assert min(picture.size) > 50
    # The tables find what they show.
    page = encoded_tables.filled(f"<!-- {table} -->\n<!-- end -->\n", args.out)
    assert page.count("\n|") > 4
    # A second run finds all work done, and comes to the same.
    before = {path: path.stat().st_mtime_ns for path in args.work.rglob("*") if path.is_file()}
    again = experiment.run(args)
    again["settings"].pop("network")
    assert json.dumps(numbers(again)) == json.dumps(numbers(found))
    assert {path: path.stat().st_mtime_ns for path in args.work.rglob("*") if path.is_file()} == before


def test_counts_of_the_class_experiment(args):
    found = encoded_classes.run(args)
    assert found["samples"] == 6 and found["settings"]["images"] == 7
    assert found["split sizes"] == [3] * 7
    assert found["own ablation flips the class"].of == 6
    assert found["another ablation flips the class"].of == 36
    for each in found["by distance"].values():
        assert each["confusion"].sum() == 6
    quality = found[encoded_tables.FRECHET]
    assert len(quality["members"]) == 7
