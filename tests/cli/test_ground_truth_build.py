"""`pyattr evaluate lds build`: killed in the middle and run again, the same bits; and its result can be judged by."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyattr.diffusion.storage import load_tensors
from pyattr.evaluation import GroundTruth, Scores, subsets

# A process that kills itself as soon as more than so many units of a stage are done: nothing can be said or cleaned up then.
KILLED = """
import os, signal, sys
from pyattr.cli import app
from pyattr.cli.display import Display

units, told = int(sys.argv[1]), Display.progress

def progress(self, done, total, which):
    told(self, done, total, which)
    if which == "ground truth" and done > units:
        os.kill(os.getpid(), signal.SIGKILL)

Display.progress = progress
app(sys.argv[2:])
"""
OPTIONS = [
    "--subsets",
    3,
    "--seeds",
    1,
    "--steps",
    2,
    "--batch-size",
    2,
    "--timesteps",
    2,
    "--threads",
    1,
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def made(images, stripes, tmp_path_factory, succeeds):
    """A folder with ground truth of three models, what was told, and the arguments."""
    out = tmp_path_factory.mktemp("truth") / "out"
    arguments = ["--data", images, "--queries", f"new={stripes}", "--queries", f"seen={images}", *OPTIONS]
    return out, succeeds("evaluate", "lds", "build", out, *arguments), arguments


def losses_of(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("ground-truth-evaluation-*/losses-*.safetensors")}


def test_what_is_made(made, images, succeeds, tmp_path):
    out, told, _ = made
    truth = GroundTruth.open(out / "evaluation.safetensors")
    with np.load(out / "images.npz") as arrays:
        train = torch.from_numpy(arrays["train_images"])
        queries = torch.from_numpy(np.concatenate([arrays["new_images"], arrays["seen_images"]]))
    truth.check_images(train, "test")
    assert truth.rows(queries, "test").tolist() == list(range(48))
    np.testing.assert_array_equal(truth.masks, subsets(24, 3, labels=[0] * 12 + [1] * 12))
    assert truth.losses.shape == (5, 3, 1, 1, 48) and np.isfinite(truth.losses).all()
    assert json.loads((out / "queries.json").read_text()) == {"new": [0, 24], "seen": [24, 48]}
    assert f"ground truth  {out / 'evaluation.safetensors'}" in told and "to do" in told
    (out / "scores").mkdir()
    scores = np.random.default_rng(0).standard_normal((48, 24))
    Scores.of("Chance", scores, train, queries, signed=True, settings={}).save(out / "scores" / "chance.safetensors")
    table = succeeds("evaluate", "lds", out, "--plots", tmp_path)
    assert "new: 24 queries, 3 subsets" in table and "seen: 24 queries" in table
    assert (tmp_path / "images-chance.png").exists()


def test_killed_in_the_middle(made, tmp_path):
    whole, _, arguments = made
    out = tmp_path / "out"
    given = [str(each) for each in ["evaluate", "lds", "build", out, *arguments]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # A model takes 2 steps of 2 images, three passes each, and 48 queries at 2 timesteps: 108. In the training of the second.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "108", *given], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = losses_of(out)
    assert len(done) == 1 and not (out / "evaluation.safetensors").exists()
    again = subprocess.run(
        [sys.executable, "-m", "pyattr", *given], env=environment, capture_output=True, timeout=300, check=True
    )
    assert "1 of 3 models found" in again.stdout.decode()
    assert losses_of(out).items() >= done.items()
    (tensors, record), (wanted, wanted_record) = (load_tensors(x / "evaluation.safetensors") for x in (out, whole))
    assert record == wanted_record and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_more_subsets_and_another_pool(made, tmp_path, succeeds, pyattr):
    whole, _, arguments = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before, first = losses_of(out), GroundTruth.open(out / "evaluation.safetensors")
    told = succeeds("evaluate", "lds", "build", out, *arguments, "--subsets", 4)
    assert "3 of 4 models found" in told and losses_of(out).items() >= before.items() and len(losses_of(out)) == 4
    more = GroundTruth.open(out / "evaluation.safetensors")
    np.testing.assert_array_equal(more.losses[:, :3], first.losses)
    fewer = pyattr("evaluate", "lds", "build", out, *arguments)
    assert (fewer.exit_code, fewer.stderr) == (
        1,
        f"pyattr: {out / 'evaluation.safetensors'} holds more than is asked for, 4 subsets and 1 models of each: "
        "ask for as many or more, or choose another folder\n",
    )
    np.testing.assert_array_equal(GroundTruth.open(out / "evaluation.safetensors").losses, more.losses)
    succeeds("evaluate", "lds", "build", out, *arguments, "--pool", "retraining")
    other = GroundTruth.open(out / "retraining.safetensors")
    assert not any((mask == more.masks).all(1).any() for mask in other.masks)


def test_refusals(made, images, tmp_path, pyattr):
    whole, _, arguments = made
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}

    def fails(code, line, *given):
        result = pyattr("evaluate", "lds", "build", whole, *given)
        assert (result.exit_code, result.stderr) == (code, f"pyattr: {line}\n")

    one = ["--data", images, "--queries", images]
    fails(1, f"{whole} holds the ground truth of other images or queries: choose another folder", *one, *OPTIONS)
    turned = [*arguments[:2], *arguments[4:6], *arguments[2:4], *OPTIONS]
    fails(1, f"{whole} holds the ground truth of other images or queries: choose another folder", *turned)
    path = whole / "evaluation.safetensors"
    other = f"{path} holds a ground truth of other options (steps was 2, now 3): choose another folder"
    fails(1, other, *arguments, "--steps", 3)
    fails(2, "Invalid value for --pool: must be one of evaluation, retraining, got test", *one, "--pool", "test")
    twice = "Invalid value for --queries: each needs a name of its own, as in validation=SOURCE, got queries twice"
    fails(2, twice, *one, "--queries", images)
    named = "Invalid value for --queries: a name is of letters, digits, - and _, and not train, got train"
    fails(2, named, "--data", images, "--queries", f"train={images}")
    fails(1, "--fraction must leave a part of the 24 training images, got 1", *arguments, "--fraction", 1)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before
