"""What `pyattr attribute` writes is what `pyattr evaluate lds` judges: never twice read out, never by models that it asked."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyattr.attribution import readout
from pyattr.diffusion import checkpoints
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, lds, subsets
from pyattr.evaluation.ground_truth import image_hashes

SCORE = ["--num-timesteps", "2", "--proj-dim", "16", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
ALONE = ["-m", "pixels", "--no-report", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def train(images):
    """The training images in the order of the command line, [N, 1, 8, 8] uint8."""
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])[:, None])


@pytest.fixture
def truth(out, train, arrays):
    """A ground truth of an output folder's images, and the file that it lies in."""
    queries = torch.from_numpy(arrays(out / "scores.npz")["queries"])
    losses = np.random.default_rng(0).standard_normal((1, 10, 1, 1, len(queries)))
    found = GroundTruth(
        subsets(24, 10), losses, ("simple",), np.arange(len(queries)), data_hash(train), tuple(image_hashes(queries)), {}
    )  # fmt: skip
    found.save(out / "evaluation.safetensors")
    return found, out / "evaluation.safetensors"


def rows(path):
    return {row["name"]: row for row in json.loads(path.read_text())["targets"]["simple"]["all"]}


def test_the_scores_of_a_folder(out, truth, tmp_path, arrays, succeeds):
    found = arrays(out / "scores.npz")
    matrices = {"dtrak": found["scores"], "pixels": found["scores_2"]}
    asked = ["-r", "signed", "-r", "squared", "--plots", tmp_path / "plots"]
    by_folder = succeeds("evaluate", "lds", out, "--json", tmp_path / "a.json", *asked)
    succeeds("evaluate", "lds", "--truth", truth[1], out, "--json", tmp_path / "b.json")
    succeeds("evaluate", "lds", "--truth", truth[1], out / "scores.npz", "--json", tmp_path / "c.json")
    assert "D-TRAK" in by_folder and "Pixel cosine" in by_folder and (tmp_path / "plots" / "lds.png").exists()
    for name, matrix in matrices.items():
        expected = 100 * lds(matrix, truth[0].masks, truth[0].outputs()).mean
        for file in ("b", "c"):
            assert rows(tmp_path / f"{file}.json")[f"out/{name}"]["lds"] == pytest.approx(expected, rel=1e-4)
        squared = 100 * lds(readout(matrix, "squared"), truth[0].masks, truth[0].outputs()).mean
        told = json.loads((tmp_path / "a.json").read_text())["targets"]["simple"]["all"]
        told = {(row["name"], row["readout"]): row["lds"] for row in told}
        assert told[f"out/{name}", "signed"] == pytest.approx(expected, rel=1e-4)
        assert told[f"out/{name}", "squared"] == pytest.approx(squared, rel=1e-4)
    settings = rows(tmp_path / "b.json")["out/dtrak"]["settings"]
    assert settings["proj_dim"] == 16 and settings["lambda"] > 0 and "lambda_" not in settings


def test_a_setting_is_chosen_among_archives(out, truth, tmp_path, succeeds):
    archives = []
    for value in ("0.1", "10"):
        succeeds("attribute", "--out", out, "-m", "dtrak", "--lambda", value, "--no-report", *SCORE)
        archives.append((out / "scores.npz").rename(tmp_path / f"lambda-{value}.npz"))
    told = succeeds(
        "evaluate", "lds", "--truth", truth[1], *archives, "--tune", "lambda", "--json", tmp_path / "x.json"
    )
    assert "tuned on other queries" in told
    (row,) = rows(tmp_path / "x.json").values()
    assert [value for value, _ in row["curve"]] == [0.1, 10]


def test_scores_of_other_models_are_no_values_of_a_setting(out, truth, tmp_path, arrays, fails, succeeds):
    np.savez(tmp_path / "queries.npz", images=arrays(out / "scores.npz")["queries"][:, 0])
    archives = []
    files = checkpoints(next(out.glob("train-*"))).values()
    for file, value in zip(files, ("0.1", "10"), strict=True):
        given = ["--checkpoint", file, "--queries", tmp_path / "queries.npz", "--lambda", value]
        succeeds("attribute", "--out", out, "-m", "dtrak", "--no-report", *given, *SCORE)
        archives.append((out / "scores.npz").rename(tmp_path / f"{file.stem}.npz"))
    command = ["evaluate", "lds", "--truth", truth[1], *archives]
    fails("--tune lambda: no two files of scores differ in that setting alone", *command, "--tune", "lambda")
    succeeds(*command, "--json", tmp_path / "x.json", "--plots", tmp_path / "plots")
    assert len({row["settings"]["model"] for row in rows(tmp_path / "x.json").values()}) == 2
    assert not (tmp_path / "plots" / "lds-against-lambda.png").exists()


def test_scores_are_not_read_out_twice(out, truth, tmp_path, arrays, fails, succeeds):
    succeeds("attribute", "--out", out, "--readout", "squared", *ALONE)
    command = ["evaluate", "lds", "--truth", truth[1], out]
    fails(
        "out holds squared scores already, of which --readout would read out again: leave --readout away, or score by "
        "--readout signed first",
        *command, "--readout", "squared",
    )  # fmt: skip
    succeeds(*command, "--json", tmp_path / "x.json")
    expected = lds(arrays(out / "scores.npz")["scores"], truth[0].masks, truth[0].outputs()).mean
    row = rows(tmp_path / "x.json")["out"]
    assert row["lds"] == pytest.approx(100 * expected, rel=1e-4) and row["settings"]["readout"] == "squared"


def test_models_that_were_asked_do_not_judge(out, truth, train, arrays, tmp_path, fails, succeeds):
    pool = tmp_path / "pool.safetensors"
    for subset, refused in ((truth[0].masks[7], True), (subsets(24, 1, pool="retraining")[0], False)):
        masks = np.stack([~subset, subset])
        queries = torch.from_numpy(arrays(out / "scores.npz")["queries"])
        losses = np.random.default_rng(1).standard_normal((1, len(masks), 1, 1, 3))
        GroundTruth(masks, losses, ("simple",), np.arange(3), data_hash(train), tuple(image_hashes(queries)), {}).save(
            pool
        )
        command = ["-m", "empirical-influence", "--pool", pool, "--no-report", "--threads", "1"]
        succeeds("attribute", "--out", out, *command)
        if refused:
            fails(
                "out: Empirical influence has asked models of this ground truth's subsets and knows their losses: "
                "score by a pool of its own, of `pyattr evaluate lds build --pool retraining`",
                "evaluate", "lds", "--truth", truth[1], out,
            )  # fmt: skip
        else:
            succeeds("evaluate", "lds", "--truth", truth[1], out)


def test_archives_that_are_none(out, truth, tmp_path, fails, succeeds):
    np.savez(tmp_path / "x.npz", scores=np.zeros((3, 24)))
    line = f"{tmp_path}/x.npz holds no scores of this version's `pyattr attribute`: make them again"
    fails(line, "evaluate", "lds", "--truth", truth[1], tmp_path / "x.npz")
    fails(
        f"{tmp_path}/y.npz is damaged or missing: make it again by `pyattr attribute`",
        "evaluate", "lds", "--truth", truth[1], tmp_path / "y.npz",
    )  # fmt: skip
    line = "files of scores must have names of their own, since rows are named by them"
    fails(line, "evaluate", "lds", "--truth", truth[1], out, out / "scores.npz")
