"""Options that a method does not have, and methods that lack what they need, are refused before work starts."""

import shutil

import numpy as np
import pytest

from pyattr import diffusion
from pyattr.cli.options import (
    DAMPED,
    GOES_WITH,
    GRADIENTS,
    METHODS,
    DataOptions,
    KeepOptions,
    SampleOptions,
    TrainOptions,
)
from pyattr.cli.stages import Sampling, Training, load_data
from pyattr.cli.workspace import Workspace


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-m", "trak", "--patch-k", 3], "--patch-k: goes with nda, got trak"),
        (["-m", "nda", "-m", "pixels", "--lambda", 1], f"--lambda: goes with {', '.join(DAMPED)}, got nda, pixels"),
        (["-m", "gas", "--lambda", 1], f"--lambda: goes with {', '.join(DAMPED)}, got gas"),
        (["-m", "nda", "--strategy", "midpoint"], f"--strategy: goes with {', '.join(GRADIENTS)}, got nda"),
        (["-m", "dtrak", "--no-centre"], "--centre: goes with pixels, got dtrak"),
        (["-m", "pixels", "--batch-size", 8], f"--batch-size: goes with {', '.join(GRADIENTS)}, got pixels"),
        (["-m", "datamodel", "--seed", 1], f"--seed: goes with {', '.join(GRADIENTS)}, nda, magic, got datamodel"),
        (["--clip", "x"], "--clip: goes with clip-similarity, got dtrak"),
        (["--similarity", "dot"], "--similarity: goes with pixels, clip-similarity, got dtrak"),
        (["--pool", "x"], "--pool: goes with empirical-influence, datamodel, got dtrak"),
        (["--checkpoints", 2], "--checkpoints: goes with tracincp, gas, got dtrak"),
        (["-m", "datamodel", "-m", "trak"], "--pool: must be a file for datamodel, got none"),
        (["--readout", "cubed"], "--readout: must be one of signed, squared, signed-squared, head, got cubed"),
        (["--readout", "head"], "--percent: goes with --readout head, got --readout head alone"),
        (["--percent", 3], "--percent: goes with --readout head, got 3 alone"),
        (["--feature", "loss"],
         "--feature: must be one of simple, elbo, square, avg, l1, l2, linf, interpolate, got loss"),
        (["--feature", "interpolate"], "--eta: goes with --feature interpolate, got --feature interpolate alone"),
        (["--feature", "l1", "--eta", 0.5], "--eta: goes with --feature interpolate, got 0.5 alone"),
        (["--feature", "l1", "-m", "trak", "-m", "dtrak"],
         "--feature: it is all that tells trak from dtrak: with it give one of them, got both"),
        (["-m", "nda", "--magic-steps", 5], "--magic-steps: goes with magic, got nda"),
        (["-m", "nda", "--memory", "1GiB"], f"--memory: goes with {', '.join(GRADIENTS)}, magic, got nda"),
        (["-m", "magic", "--batch-size", 8], f"--batch-size: goes with {', '.join(GRADIENTS)}, got magic"),
        (["--check-smoothness"], "--check-smoothness: goes with magic, got dtrak"),
        (["-m", "magic", "--magic-network", "big"],
         "--magic-network: must be one of score-net, mnist-small, cifar, celeba, got big"),
        (["-m", "magic", "--magic-phi", "bits"], "--magic-phi: must be one of loss, likelihood, got bits"),
        (["-m", "magic", "--magic-phi", "likelihood"],
         "--magic-phi: likelihood goes with --magic-network score-net, got mnist-small"),
        (["-m", "magic", "--magic-probes", 3], "--magic-probes: goes with --magic-phi likelihood, got loss"),
        (["-m", "magic", "--magic-network", "score-net", "--magic-phi", "likelihood", "--magic-draws", 3],
         "--magic-draws: goes with --magic-phi loss, got likelihood"),
        (["-m", "magic", "--magic-network", "score-net", "--magic-phi", "likelihood", "--magic-divergence", "exact",
          "--magic-probes", 3], "--magic-probes: goes with --magic-divergence hutchinson, got exact"),
        (["-m", "magic", "--magic-checkpointing", "some"],
         "--magic-checkpointing: must be one of auto, all, sqrt, tree, binomial, got some"),
        (["-m", "pixels", "--similarity", "l2"], "--similarity: must be one of cosine, dot, got l2"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(arguments, line, tmp_path, fails):
    fails(f"Invalid value for {line}", "attribute", "--out", tmp_path / "out", *arguments, code=2)
    assert not (tmp_path / "out").exists()


def test_an_option_serves_whichever_method_has_it(images, tmp_path, succeeds):
    given = ["attribute", "--out", tmp_path / "out", "--data", images, "--queries", images / "dark"]
    succeeds(*given, "-m", "pixels", "-m", "nda", "--patch-timesteps", 1, "--no-centre", "--no-report")


def test_every_option_of_some_methods_is_one_of_the_command():
    from typer.main import get_command

    from pyattr.cli import app

    command = get_command(app).commands["attribute"]
    assert GOES_WITH.keys() <= {parameter.opts[0] for parameter in command.params}
    assert {name for having in GOES_WITH.values() for name in having} == set(METHODS)


def test_numbers_out_of_bounds(followed, tmp_path, fails):
    given = ["attribute", "--out", followed, "--device", "cpu"]
    fails("Readout: percent must lie in (0, 100], got 0.0", *given, "--readout", "head", "--percent", 0)
    fails("Loss: eta must lie in [0, 1], got 1.5", *given, "--feature", "interpolate", "--eta", 1.5)


def test_journeys_that_are_not_known(finished, followed, images, fails):
    needs = "attribute: journey-trak needs generated images with the way on which they were made, got images "
    fails(f"{needs}without: run `pyattr generate --trajectory --out {finished}` first",
          "attribute", "--out", finished, "-m", "pixels", "-m", "journey-trak", "--device", "cpu")  # fmt: skip
    fails(f"{needs}from files: leave --queries out, and run `pyattr generate --trajectory --out {followed}` first",
          "attribute", "--out", followed, "-m", "journey-trak", "--queries", images, "--device", "cpu")  # fmt: skip


def test_too_few_checkpoints(followed, images, tmp_path, fails):
    folder = next(followed.glob("train-*"))
    more = "`pyattr train --keep-checkpoints COUNT` keeps more"
    given = ["attribute", "--out", followed, "-m", "gas", "--device", "cpu"]
    fails(
        f"attribute: checkpoints must be at most 3, as many as lie in {folder}, got 4: {more}",
        *given,
        "--checkpoints",
        4,
    )
    first = diffusion.checkpoints(folder)[1]
    told = f"attribute: gas needs at least 2 checkpoints of the training, got 1 in {folder}: {more}"
    fails(told, *given, "--checkpoint", first, "--queries", images)
    # A model's file has no history, whatever lies beside it.
    shutil.copy(first, tmp_path / "model.safetensors")
    shutil.copy(first, tmp_path / first.name)
    given += ["--checkpoint", tmp_path / "model.safetensors", "--data", images, "--queries", images]
    fails(f"attribute: gas needs at least 2 checkpoints of the training, got 1 in {tmp_path}: {more}", *given)


def test_no_classes_to_stand_in_for_clip(images, tmp_path, fails):
    told = (
        "attribute: clip-similarity needs CLIP's weights (--clip FOLDER), or training images of at least two classes for a "
        "classifier whose features stand in, got images of none or one"
    )
    given = ["attribute", "--out", tmp_path / "out", "--queries", images / "dark", "-m", "clip-similarity"]
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8), np.uint8))
    fails(told, *given, "--data", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.ones(3, np.int64))
    fails(told, *given, "--data", tmp_path / "x.npz")


def test_room_for_what_is_kept(images, tmp_path):
    data = load_data(DataOptions(str(images)))
    with Workspace(tmp_path / "out") as workspace:
        sizes = [
            Training(workspace, data, TrainOptions(steps=40), KeepOptions(every, count)).size
            for every, count in ((None, 2), (None, 20), (None, 50), (10, 50))
        ]
        plain, whole = (
            Sampling(workspace, "m", (1, 8, 8), SampleOptions(num_images=2, steps=50, trajectory=kept)).size
            for kept in (False, True)
        )
    assert [size * 4 // sizes[0] for size in sizes] == [
        4,
        22,
        22,
        6,
    ]  # two more than are kept, of 20, 20 and 4 that are made
    assert whole - plain == 2 * 4 * 2 * 64 * 51
