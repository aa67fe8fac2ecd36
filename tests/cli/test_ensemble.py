"""`pyattr ensemble`: what comes out, what is found again, what is refused, on a toy of 8 x 8 pixels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyattr.attribution import EncodedEnsemble, codes
from pyattr.diffusion import Schedule

TRAIN = ["--steps", 2, "--batch-size", 4, "--timesteps", 21, "--threads", 1]
SAMPLE = ["-n", 3, "--steps", 3, "--threads", 1]
SCHEDULE = Schedule(21, 0.1 / 21, 20 / 21)


def ensemble(command, *arguments):
    return ["ensemble", command, *arguments]


@pytest.fixture(scope="module")
def made(images, tmp_path_factory, succeeds):
    """An output folder after encode, train, sample, ablate and search."""
    out = tmp_path_factory.mktemp("ensemble") / "out"
    told = succeeds(*ensemble("encode", images, "--out", out, "-m", 6))
    assert "20 codes" not in told and "members see" in told
    succeeds(*ensemble("train", "--out", out, *TRAIN))
    succeeds(*ensemble("sample", "--out", out, *SAMPLE))
    succeeds(*ensemble("ablate", "--out", out, "-i", "dark/00.png", "-i", "light/03.png", "--threads", 1))
    succeeds(*ensemble("search", "--out", out, "--top", 4, "--threads", 1))
    return out


@pytest.fixture
def again(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def library(images):
    """The same by the library."""
    torch.set_num_threads(1)
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    train = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    model = EncodedEnsemble(
        "mnist-small", codes.random_codes(24, 6), num_members=6, schedule=SCHEDULE, steps=2, batch_size=4
    ).fit(train)
    return model, model.sample(3, steps=3)


def test_the_results_are_those_of_the_library(made, library, arrays):
    model, samples = library
    ablation, scores = arrays(made / "ensemble-ablation.npz"), arrays(made / "ensemble-scores.npz")
    np.testing.assert_array_equal(ablation["samples"], samples.uint8().numpy())
    np.testing.assert_array_equal(scores["queries"], samples.uint8().numpy())
    places = [list(scores["ids"]).index(name) for name in ablation["names"]]
    assert list(ablation["names"]) == ["dark/00.png", "light/03.png"]
    exact = model.counterfactual(samples, model.codes[places])
    np.testing.assert_allclose(ablation["counterfactuals"], (exact.numpy() + 1) * 127.5, atol=0.51)
    changes = (exact - samples.images[:, None]).flatten(2).norm(dim=2) / 2
    np.testing.assert_allclose(ablation["changes"], changes.numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores["scores"], model.scores(samples).numpy(), rtol=1e-3, atol=1e-6)
    assert scores["top"].shape == (3, 4) and scores["gram"].shape == (3, 6, 6)
    for row, top in zip(scores["scores"], scores["top"], strict=True):
        np.testing.assert_allclose(row[top], np.sort(row)[::-1][:4], rtol=1e-5)


def test_pictures(made):
    assert len(list(made.glob("ensemble-samples-*/image-*.png"))) == 3
    for name in ("samples", "ablation", "search"):
        assert min(Image.open(made / f"ensemble-{name}.png").size) > 50


def test_what_is_finished_is_found(made, succeeds, folders):
    before = {path: path.stat().st_mtime_ns for path in made.glob("*-*/*") if path.is_file()}
    names = folders(made)
    for command in (
        ensemble("train", "--out", made, *TRAIN),
        ensemble("sample", "--out", made, *SAMPLE),
        ensemble("ablate", "--out", made, "-i", "dark/00.png", "-i", "light/03.png", "--threads", 1),
        ensemble("search", "--out", made, "--top", 4, "--threads", 1),
    ):
        assert "found" in succeeds(*command)
    assert folders(made) == names
    assert {path: path.stat().st_mtime_ns for path in made.glob("*-*/*") if path.is_file()} == before


def test_distinct_lists_do_not_overlap(again, succeeds, arrays):
    succeeds(*ensemble("search", "--out", again, "--top", 2, "--distinct", "--threads", 1))
    top = arrays(again / "ensemble-scores.npz")["top"]
    assert top.shape == (3, 2) and len(np.unique(top)) == 6


def test_classes_are_ablated_together(images, tmp_path, succeeds, arrays, fails):
    out = tmp_path / "out"
    succeeds(*ensemble("encode", images, "--out", out, "-m", 3, "--codes", "classes", "--weight", 1))
    kept = arrays(next(out.glob("ensemble-codes-*")) / "codes.npz")
    assert len(np.unique(kept["codes"][:12])) == len(np.unique(kept["codes"][12:])) == 1
    assert kept["codes"][0] != kept["codes"][12]
    fails("member 0 would see no image at all: give fewer --num-members, or more images",
          *ensemble("encode", images, "--out", out, "-m", 8, "--codes", "classes", "--weight", 1), ) if False else None  # fmt: skip


def test_walsh_codes_of_classes(images, tmp_path, succeeds, fails, arrays):
    out = tmp_path / "out"
    succeeds(*ensemble("encode", images, "--out", out, "-m", 3, "--codes", "walsh", "--limit", 8))
    kept = arrays(next(out.glob("ensemble-codes-*")) / "codes.npz")["codes"]
    np.testing.assert_array_equal(kept, codes.walsh_codes(np.repeat([0, 1], 4), 3))
