"""What `pyattr attribute` writes is what `pyattr evaluate lds` judges: never twice read out, never by models that it asked."""

import json

import numpy as np
import pytest
import torch
from toy_runs import SCORE

from pyattr.attribution import readout
from pyattr.diffusion import checkpoints
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, lds, subsets
from pyattr.evaluation.ground_truth import image_hashes

ALONE = ["-m", "pixels", "--no-report", "--threads", "1", "--device", "cpu"]


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
        if name == "dtrak":
            assert told[f"out/{name}", "squared"] == pytest.approx(squared, rel=1e-4)
        else:  # a likeness has no sign
            assert (f"out/{name}", "squared") not in told
    assert "no readout of out/pixels: such scores have no sign, or were read out already" in by_folder
    settings = rows(tmp_path / "b.json")["out/dtrak"]["settings"]
    assert settings["proj_dim"] == 16 and settings["lambda"] > 0 and "lambda_" not in settings
    assert settings["chosen"] == {"lambda": "automatically"} and settings["models"] == 1 and settings["step"] == 3
    assert rows(tmp_path / "b.json")["out/pixels"]["settings"] == {"similarity": "cosine", "centre": True}


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
    settings = [row["settings"] for row in rows(tmp_path / "x.json").values()]
    assert len({each["model"] for each in settings}) == 2 and sorted(each["step"] for each in settings) == [2, 3]
    assert not (tmp_path / "plots" / "lds-against-lambda.png").exists()


def test_lines_of_real_archives(out, truth, tmp_path, arrays, succeeds):
    """Checkpoints of one training, and an ensemble of them, at lambdas of their own."""
    np.savez(tmp_path / "queries.npz", images=arrays(out / "scores.npz")["queries"][:, 0])
    first, second = checkpoints(next(out.glob("train-*"))).values()
    archives = []
    for number, files in enumerate(([first], [second], [first, second])):
        models = [argument for file in files for argument in ("--checkpoint", file)]
        given = ["--queries", tmp_path / "queries.npz", "--no-report", *SCORE]
        succeeds("attribute", "--out", out, "-m", "dtrak", *models, *given)
        archives.append((out / "scores.npz").rename(tmp_path / f"{number}.npz"))
    command = ["evaluate", "lds", "--truth", truth[1], *archives]
    succeeds(*command, "--json", tmp_path / "x.json", "--plots", tmp_path / "plots")
    found = [row["settings"] for _, row in sorted(rows(tmp_path / "x.json").items())]
    assert [(each["models"], each["step"]) for each in found] == [(1, 2), (1, 3), (2, [2, 3])]
    assert len({json.dumps(each["lambda"]) for each in found}) == 3
    names = {path.name for path in (tmp_path / "plots").glob("lds-against-*")}
    assert names == {"lds-against-step.png", "lds-against-models.png"}


def test_options_of_other_methods_make_no_difference(out, truth, tmp_path, arrays, succeeds):
    """What a command says to DAS is not said of gradient-dot beside it."""
    given = ["-m", "gradient-dot", "-m", "das", "--no-report", *SCORE]
    archives = []
    for number, options in enumerate(([], ["--leverage", "--lambda", "1", "--solve-dtype", "float32"])):
        succeeds("attribute", "--out", out, *given, *options)
        archives.append((out / "scores.npz").rename(tmp_path / f"{number}.npz"))
    succeeds("evaluate", "lds", "--truth", truth[1], *archives, "--json", tmp_path / "x.json")
    found = {name: row["settings"] for name, row in rows(tmp_path / "x.json").items()}
    assert found["0/gradient-dot"] == found["1/gradient-dot"]
    dots = set(found["0/gradient-dot"])
    assert dots == {
        "num_timesteps", "strategy", "feature", "normalize", "num_noises", "query_noises", "kind", "proj_dim", "seed",
        "model", "models", "step",
    }  # fmt: skip
    own = {"lambda", "solve_dtype", "residuals", "leverage", "readout"}
    assert set(found["0/das"]) - dots == own | {"chosen"} and set(found["1/das"]) - dots == own
    assert found["1/das"]["leverage"] is True and found["1/das"]["feature"] == "avg" and found["1/das"]["normalize"]


def test_scores_are_not_read_out_twice(out, truth, tmp_path, arrays, fails, succeeds):
    succeeds("attribute", "--out", out, "--readout", "signed-squared", *SCORE, "-m", "dtrak", "--no-report")
    command = ["evaluate", "lds", "--truth", truth[1], out]
    why = "no readout of out: such scores have no sign, or were read out already"
    fails(f"{why}: leave --readout away, or give --readout signed as well", *command, "--readout", "squared")
    expected = lds(arrays(out / "scores.npz")["scores"], truth[0].masks, truth[0].outputs()).mean
    for asked in ([], ["-r", "squared", "-r", "signed"]):
        told = succeeds(*command, "--json", tmp_path / "x.json", *asked)
        (row,) = json.loads((tmp_path / "x.json").read_text())["targets"]["simple"]["all"]
        assert row["lds"] == pytest.approx(100 * expected, rel=1e-4)
        assert (row["readout"], row["plain"], row["settings"]["readout"]) == ("signed", False, "signed_squared")
        assert (f"{why}; they stand once, as they are, under signed" in told) == bool(asked)


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
