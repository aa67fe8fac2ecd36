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
from PIL import Image

from pyattr.diffusion import DamagedFileError
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


def test_more_subsets_and_another_pool(made, tmp_path, succeeds):
    whole, _, arguments = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before, first = losses_of(out), GroundTruth.open(out / "evaluation.safetensors")
    told = succeeds("evaluate", "lds", "build", out, *arguments, "--subsets", 4)
    assert "3 of 4 models found" in told and losses_of(out).items() >= before.items() and len(losses_of(out)) == 4
    more = GroundTruth.open(out / "evaluation.safetensors")
    np.testing.assert_array_equal(more.losses[:, :3], first.losses)
    succeeds("evaluate", "lds", "build", out, *arguments, "--pool", "retraining")
    other = GroundTruth.open(out / "retraining.safetensors")
    assert not any((mask == more.masks).all(1).any() for mask in other.masks)


def everything(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("given", "differ"),
    [
        (["--subsets", 4, "--steps", 3], "training.steps was 2, now 3"),
        (["--network", "cifar"], 'model was "mnist-small", now "cifar"'),
        (
            ["--learning-rate", 0.5, "--flip"],
            "training.flip was false, now true; training.learning_rate was 0.0001, now 0.5",
        ),
        (["--timesteps", 4, "--noises", 2], "evaluation.num_noises was 1, now 2; evaluation.timesteps was 2, now 4"),
        (["--seed", 1], "seed was 0, now 1"),
        (["--fraction", 0.25], "images of a subset was 12, now 6"),
        (["--seeds", 2, "--subsets", 3], "subsets was 4, now 3"),
        (["--seeds", 1], "seeds was 2, now 1"),
    ],
)
def test_a_finished_ground_truth_is_not_replaced_by_another(grown, fails_in, given, differ):
    fails_in(grown, f"{grown}/evaluation.safetensors was made otherwise: {differ}; choose another folder", *given)


@pytest.fixture(scope="module")
def grown(made, tmp_path_factory, succeeds):
    """A copy of the folder with a subset and a seed more."""
    whole, _, arguments = made
    out = tmp_path_factory.mktemp("grown") / "out"
    shutil.copytree(whole, out)
    succeeds("evaluate", "lds", "build", out, *arguments, "--subsets", 4, "--seeds", 2)
    return out


@pytest.fixture(scope="module")
def fails_in(made, pyattr):
    """With the arguments that made a folder and others, of four subsets and two seeds where these do not say, building in
    it fails, and leaves all as it was."""

    def run(out, line, *given):
        before = everything(out)
        result = pyattr("evaluate", "lds", "build", out, *made[2], "--subsets", 4, "--seeds", 2, *given)
        assert (result.exit_code, result.stderr) == (1, f"pyattr: {line}\n")
        assert everything(out) == before

    return run


def test_a_ground_truth_of_other_labels_or_images_is_not_replaced(grown, images, tmp_path, fails_in):
    """The folder's other files need not lie there."""
    (tmp_path / "out").mkdir()
    shutil.copy(grown / "evaluation.safetensors", tmp_path / "out")
    path = tmp_path / "out" / "evaluation.safetensors"
    files = sorted(images.rglob("*.png"))
    for name, labels, line in (
        ("labels", [0] * 20 + [1] * 4, f"{path} was made otherwise: its subsets are others, drawn by other labels; choose "
         "another folder"),
        ("turned", [0] * 12 + [1] * 12, f"{tmp_path}/out holds the ground truth of other images or queries: choose another "
         "folder"),
    ):  # fmt: skip
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        np.savez(tmp_path / f"{name}.npz", images=pixels[::-1] if name == "turned" else pixels, labels=labels)
        fails_in(tmp_path / "out", line, "--data", tmp_path / f"{name}.npz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedFileError) as error:
        GroundTruth.open(path)
    fails_in(tmp_path / "out", error.value)


def test_unfinished_work_of_another_recipe_lies_beside(made, tmp_path, succeeds, fails_in):
    whole, _, arguments = made
    out, other = tmp_path / "out", [*arguments, "--steps", 1]
    shutil.copytree(whole, out)
    succeeds("evaluate", "lds", "build", tmp_path / "other", *other)
    (stage,) = (tmp_path / "other").glob("ground-truth-evaluation-*")
    (stage / "losses-0001-00.safetensors").unlink()
    (stage / "stage.json").unlink()
    shutil.copytree(stage, out / stage.name)
    # What is finished stays and may grow, whatever else was begun.
    finished = f"{out}/evaluation.safetensors was made otherwise: training.steps was 2, now 1; choose another folder"
    fails_in(out, finished, "--steps", 1)
    succeeds("evaluate", "lds", "build", out, *arguments)
    kept, first = (GroundTruth.open(folder / "evaluation.safetensors") for folder in (out, whole))
    np.testing.assert_array_equal(kept.losses, first.losses)
    assert kept.settings == first.settings
    # Without it either goes on, and the first to end decides.
    (out / "evaluation.safetensors").unlink()
    assert "2 of 3 models found" in succeeds("evaluate", "lds", "build", out, *other)
    assert GroundTruth.open(out / "evaluation.safetensors").settings["training"]["steps"] == 1
    begun = f"{out}/evaluation.safetensors was made otherwise: training.steps was 1, now 2; choose another folder"
    fails_in(out, begun)


def test_refusals(made, images, tmp_path, pyattr):
    whole, _, arguments = made
    before = everything(whole)

    def fails(code, line, *given):
        result = pyattr("evaluate", "lds", "build", whole, *given)
        assert (result.exit_code, result.stderr) == (code, f"pyattr: {line}\n")

    one = ["--data", images, "--queries", images]
    fails(1, f"{whole} holds the ground truth of other images or queries: choose another folder", *one, *OPTIONS)
    turned = [*arguments[:2], *arguments[4:6], *arguments[2:4], *OPTIONS]
    fails(1, f"{whole} holds the ground truth of other images or queries: choose another folder", *turned)
    fails(2, "Invalid value for --pool: must be one of evaluation, retraining, got test", *one, "--pool", "test")
    twice = "Invalid value for --queries: each needs a name of its own, as in validation=SOURCE, got queries twice"
    fails(2, twice, *one, "--queries", images)
    named = "Invalid value for --queries: a name is of letters, digits, - and _, and not train, got train"
    fails(2, named, "--data", images, "--queries", f"train={images}")
    fails(1, "--fraction must leave a part of the 24 training images, got 1", *arguments, "--fraction", 1)
    assert everything(whole) == before
