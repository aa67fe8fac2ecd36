"""`pyattr attribute --method magic`: the library's scores, whatever was stopped, and what is said of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyattr import diffusion
from pyattr.attribution import MAGIC
from pyattr.attribution.magic import SCHEMES, Adam, LogLikelihood, NegativeLoss, NoiseLoss
from pyattr.attribution.magic import training as magic_training
from pyattr.cli.options import MAGIC_CHECKPOINTING, MAGIC_NETWORKS, DataOptions, MagicOptions
from pyattr.cli.scoring.magic import MagicScoring
from pyattr.cli.stages import load_data
from pyattr.cli.workspace import Workspace
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, lds, subsets
from pyattr.evaluation.ground_truth import image_hashes

SMALL = ["-m", "magic", "--magic-steps", 7, "--magic-batch-size", 3, "--magic-draws", 2, "--seed", 3, "--threads", 1,
         "--device", "cpu"]  # fmt: skip
ADAM = Adam(learning_rate=5e-4, eps_root=1e-4)
ROOT = Path(__file__).parents[2]

# The command line, killed at its sixth step.
KILLED = """
import os, signal
from pyattr.attribution.magic.training import WeightedTraining
from pyattr.cli.commands import main

def advance(self, state, step, weights, advance=WeightedTraining.advance):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, state, step, weights)

WeightedTraining.advance = advance
main()
"""


@pytest.fixture(scope="module")
def arrays_of(tmp_path_factory):
    """Files of ten training images and two queries of one size, and their pixels [N, 1, S, S]."""

    def make(size):
        folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(size)
        found = []
        for name, count in (("train", 10), ("queries", 2)):
            pixels = rng.integers(0, 256, (count, size, size), np.uint8)
            np.savez(folder / f"{name}.npz", images=pixels)
            found += [folder / f"{name}.npz", torch.from_numpy(pixels)[:, None]]
        return found

    return make


@pytest.fixture(scope="module")
def noise(arrays_of):
    return arrays_of(8)


@pytest.fixture(scope="module")
def given(noise):
    """The images, as options."""
    return ["--data", noise[0], "--queries", noise[2]]


@pytest.fixture(scope="module")
def scored(given, succeeds, tmp_path_factory):
    """An output folder with scores, and what the command said."""
    out = tmp_path_factory.mktemp("scored") / "out"
    return out, succeeds("attribute", "--out", out, *given, *SMALL, "--check-smoothness")


def seeded(make, seed=3):
    torch.manual_seed(seed)
    return make()


def test_names_are_those_of_the_library():
    assert MAGIC_CHECKPOINTING == ("auto", *SCHEMES)
    assert set(MAGIC_NETWORKS) == {"score-net", *diffusion.PRESETS}


def test_the_scores_are_the_librarys(scored, noise, arrays):
    out, told = scored
    found, (_, train, _, queries) = arrays(out / "scores.npz"), noise
    loss = NoiseLoss(diffusion.Schedule())
    torch.set_num_threads(1)
    method = MAGIC(
        seeded(lambda: diffusion.unet("mnist-small", channels=1, size=8)),
        loss,
        NegativeLoss(loss, draws=2, seed=3),
        steps=7,
        batch_size=3,
        optimiser=ADAM,
        seed=3,
    ).fit(train)
    np.testing.assert_array_equal(found["scores"], method.scores(queries))
    assert found["scores"].min() < 0 < found["scores"].max()
    assert found["methods"].tolist() == ["MAGIC"] and found["signed"].tolist() == [True]
    assert found["opponents"].shape == (2, 5)
    assert "MAGIC train 7/7 steps" in told and "MAGIC replay 7/7 steps" in told
    stages = [next(out.glob(f"magic-{name}-*")) for name in ("smoothness", "train", "scores")]
    smoothness, training, _ = (json.loads((stage / "stage.json").read_text()) for stage in stages)
    assert training["settings"]["optimiser"]["eps_root"] == 1e-4
    page, values = (out / "report.html").read_text(), method.values(queries)
    for words in (
        "MAGIC trained a network of its own (mnist-small, 7 steps). Its scores belong to that training and to its model, "
        f"{stages[1].name}/model.safetensors, not to another in the output folder",
        "to first order",
        "7 × 3",
        "betas 0.95, 0.975; 0.0001 under the root",
        f"{float(values.min()):.4g} to {float(values.max()):.4g}",
        f"{smoothness['metasmoothness']:.3f}",
    ):
        assert words in page, words
    assert "was not measured" not in page and "have score 0" not in page


def test_found_again(scored, given, succeeds, arrays):
    """Other queries and another phi need no other training, and the same ones nothing at all."""
    out, _ = scored
    first = arrays(out / "scores.npz")["scores"]
    told = succeeds("attribute", "--out", out, *given, *SMALL, "--check-smoothness", "--magic-checkpointing", "sqrt")
    assert told.count("found") == 3 and "replay" not in told
    told = succeeds("attribute", "--out", out, *given, *SMALL, "--magic-draws", 3, "--magic-checkpointing", "all")
    assert told.count("found") == 1 and "to do" in told and "MAGIC train 7/7" not in told
    assert "which was not measured here; --check-smoothness does that" in (out / "report.html").read_text()
    assert not np.array_equal(arrays(out / "scores.npz")["scores"], first)
    assert len(list(out.glob("magic-train-*"))) == 1


def test_a_rough_training_is_called_rough(scored, given, succeeds):
    out, _ = scored
    path = next(out.glob("magic-smoothness-*")) / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metasmoothness": 0.25, "linearity": 0.5}))
    succeeds("attribute", "--out", out, *given, *SMALL, "--check-smoothness")
    page = (out / "report.html").read_text()
    assert "training is rough: metasmoothness 0.25, where 0.9 is wanted" in page
    settings = json.loads(str(np.load(out / "scores.npz")["settings"]))["methods"][0]
    assert (settings["metasmoothness"], settings["linearity"]) == (0.25, 0.5)


def test_the_likelihood_of_the_score_net(arrays_of, tmp_path, succeeds, arrays):
    path, train, asked, queries = arrays_of(28)
    options = ["--magic-network", "score-net", "--magic-phi", "likelihood", "--magic-solver-steps", 1]
    small = ["-m", "magic", "--magic-steps", 2, "--magic-batch-size", 3, "--threads", 1, "--device", "cpu"]
    out = tmp_path / "out"
    succeeds("attribute", "--out", out, "--data", path, "--queries", asked, *small, *options, "--magic-probes", 2)
    torch.set_num_threads(1)
    sde = diffusion.VarianceExploding(25.0)
    method = MAGIC(
        seeded(lambda: diffusion.ScoreNet(sde), 0),
        diffusion.ScoreLoss(sde, mean=True),
        LogLikelihood(sde, solver="rk4", steps=1, divergence="hutchinson", probes=2, bits=True),
        steps=2,
        batch_size=3,
        optimiser=ADAM,
    ).fit(train)
    np.testing.assert_array_equal(arrays(out / "scores.npz")["scores"], method.scores(queries))
    page = (out / "report.html").read_text()
    for words in (
        "minus bits per dimension",
        "1 steps of Runge and Kutta’s method, divergence along 2 random directions",
        "training saw 6 of the 10 training images; the others have score 0",
        "not to a model in the output folder, nor to one that made the queries",
    ):
        assert words in page, words
    assert not list(out.glob("magic-train-*/model.safetensors"))  # no sampler of the command line takes it


def test_images_that_its_own_model_made(scored, given, tmp_path, succeeds, arrays):
    """The model that the training left is one as any other: it generates, and other methods ask it."""
    out, _ = scored
    model = next(out.glob("magic-train-*")) / "model.safetensors"
    succeeds("generate", "--out", out, "--checkpoint", model, "-n", 2, "--steps", 2, "--threads", 1, "--device", "cpu")
    told = succeeds("attribute", "--out", out, "--data", given[1], "--checkpoint", model, *SMALL, "-m", "gradient-dot",
                    "--num-timesteps", 1, "--proj-dim", 8)  # fmt: skip
    assert "1/4  MAGIC training" in told and "MAGIC train 7/7" not in told
    found = arrays(out / "scores.npz")
    assert found["methods"].tolist() == ["MAGIC", "Gradient dot"]
    assert found["query_names"].tolist() == ["Generated image 0", "Generated image 1"]
    assert "nobody checked" not in (out / "report.html").read_text()  # the file says on which images


# Interruptions


def test_killed_and_stopped_it_ends_as_if_never_stopped(
    scored, given, noise, tmp_path, monkeypatch, pyattr, succeeds, arrays
):
    out = tmp_path / "out"
    command = [*map(str, ("attribute", "--out", out, *given, *SMALL)), "--magic-checkpointing", "sqrt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command], env=environment, stdout=subprocess.DEVNULL, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    states = [int(path.stem[-8:]) for path in out.glob("magic-train-*/state-*.safetensors")]
    assert states == [3] and not (out / "scores.npz").exists()
    # Ctrl-C in the replay.
    pull = magic_training.WeightedTraining.pull

    def stopped(self, state, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        pull(self, state, step, *rest)

    monkeypatch.setattr(magic_training.WeightedTraining, "pull", stopped)
    result = pyattr(*command)
    monkeypatch.undo()
    told = "pyattr: interrupted: run the same command again to go on from here\n"
    assert (result.exit_code, result.stderr) == (130, told) and "partly done" in result.stdout
    assert "MAGIC train 7/7" in result.stdout
    told = succeeds(*command)
    assert "MAGIC train 7/7" not in told and "MAGIC replay 7/7" in told
    name = next(scored[0].glob("magic-train-*")).name
    assert (out / name).is_dir()
    files = [folder / name / "model.safetensors" for folder in (out, scored[0])]
    first, second = (diffusion.load_model(file).state_dict() for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    # In one piece, with all states in memory.
    succeeds("attribute", "--out", tmp_path / "whole", *given, *SMALL)
    found, wanted = (arrays(folder / "scores.npz")["scores"] for folder in (out, tmp_path / "whole"))
    np.testing.assert_array_equal(found, wanted)


# Evaluation


def test_evaluate_lds_reads_it(given, noise, tmp_path, succeeds, arrays):
    out, (_, train, _, queries) = tmp_path / "out", noise
    for rate in ("0.001", "0.002"):
        succeeds("attribute", "--out", out, *given, *SMALL, "--magic-learning-rate", rate, "--no-report")
        (out / "scores.npz").rename(tmp_path / f"{rate}.npz")
    losses = np.random.default_rng(0).standard_normal((1, 8, 1, 1, 2))
    truth = GroundTruth(
        subsets(10, 8), losses, ("simple",), np.arange(2), data_hash(train), tuple(image_hashes(queries)), {}
    )
    truth.save(tmp_path / "truth.safetensors")
    files = [tmp_path / "0.001.npz", tmp_path / "0.002.npz"]
    succeeds("evaluate", "lds", "--truth", tmp_path / "truth.safetensors", *files, "--json", tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())["targets"]["simple"]["all"]
    for row in rows:
        path = tmp_path / f"{row['name']}.npz"
        expected = 100 * lds(arrays(path)["scores"], truth.masks, truth.outputs()).mean
        assert row["lds"] == pytest.approx(expected, rel=1e-4) and row["method"] == "MAGIC"
        assert row["settings"]["learning_rate"] == float(row["name"]) and row["settings"]["train_batch_size"] == 3
        assert not {"memory", "checkpointing", "check_smoothness", "method"} & row["settings"].keys()
    assert len({row["settings"]["model"] for row in rows}) == 2


# Refusals


def test_images_and_options_that_cannot_be(arrays_of, given, tmp_path, fails, succeeds):
    out = tmp_path / "out"
    attribute = ["attribute", "--out", out, *given, *SMALL]
    score_net = ["--magic-network", "score-net"]
    fails("the network score-net takes images of 1×28×28, got 1×8×8: give --size 28, or --magic-network mnist-small",
          *attribute, *score_net)  # fmt: skip
    np.savez(tmp_path / "colour.npz", images=np.zeros((2, 28, 28, 3), np.uint8))
    np.savez(tmp_path / "odd.npz", images=np.zeros((2, 10, 10), np.uint8))
    colour, odd = (
        ["--data", tmp_path / f"{name}.npz", "--queries", tmp_path / f"{name}.npz"] for name in ("colour", "odd")
    )
    fails("the network score-net takes images of 1×28×28, got 3×28×28: give --magic-network mnist-small",
          *attribute[:3], *colour, *SMALL, *score_net)  # fmt: skip
    fails("the network mnist-small needs square images whose side is a multiple of 4, got 10x10: give --size 8",
          *attribute[:3], *odd, *SMALL)  # fmt: skip
    fails("Adam: learning_rate must be positive, got -1.0", *attribute, "--magic-learning-rate", -1)
    fails("Adam: eps_root must be positive, got 0.0", *attribute, "--magic-eps-root", 0)
    fails("MAGIC: memory must hold at least two states of 5126448 bytes each, got 1048576 bytes",
          *attribute, "--memory", "1MiB")  # fmt: skip
    fails(f"no trained model in {out}: give --data and --queries, enough for magic, or run `pyattr train SOURCE --out {out}` "
          "first", *attribute[:5], *SMALL)  # fmt: skip


def test_a_training_that_diverges(given, tmp_path, pyattr):
    options = ["--magic-learning-rate", "1e30"]
    for more in ([], ["--check-smoothness"]):
        result = pyattr("attribute", "--out", tmp_path / "out", *given, *SMALL, *options, *more)
        assert (result.exit_code, result.stderr) == (
            1,
            "pyattr: attribute: the loss of magic's training is not finite: give a lower --magic-learning-rate, or a larger "
            "--magic-eps-root\n",
        )


def test_room_for_states(noise, tmp_path):
    data, sizes = load_data(DataOptions(str(noise[0]))), []
    with Workspace(tmp_path) as workspace:
        for scheme in ("all", "sqrt"):
            options = MagicOptions(steps=100, checkpointing=scheme)
            sizes.append(MagicScoring(workspace, data, options, device=torch.device("cpu")).training.size)
    assert sizes[0] - sizes[1] == (100 - 19) * 12 * 427204  # of 100 states, the first of ten tens and the last ten
