"""`pyattr evaluate lds`: the table, its numbers and pictures, from files that were made here."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from lds_problem import ASKED, GROUPS, IMAGES, MATRICES, QUERIES, TRAIN, make, noisy

from pyattr.evaluation import GroundTruth, Scores, lds, lds_difference, read_dattri, tune_on_split, two_folds


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make(tmp_path_factory.mktemp("problem"))


def files(problem):
    return sorted((problem / "scores").rglob("*.safetensors"))


def numbers(path, target="simple"):
    return {
        (group, row["name"], row["readout"]): row
        for group, rows in json.loads(path.read_text())["targets"][target].items()
        for row in rows
    }


def test_the_numbers_are_those_of_lds(problem, tmp_path, succeeds):
    told = succeeds(
        "evaluate", "lds", problem, "--json", tmp_path / "x.json", "-t", "simple", "-t", "elbo", "-r", "signed",
        "-r", "squared", "--against", "raw pixel",
    )  # fmt: skip
    truth = GroundTruth.open(problem / "evaluation.safetensors")
    for target in ("simple", "elbo"):
        outputs, found = truth.outputs(target), numbers(tmp_path / "x.json", target)
        assert len(found) == 2 * (3 + 4)  # the scores of generated queries alone are in no other group
        for (group, name, readout), row in found.items():
            matrix = Scores.open(problem / "scores" / f"{name}.safetensors").matrix
            matrix = matrix if len(matrix) == QUERIES else np.pad(matrix, ((4, 0), (0, 0)))
            pixel = Scores.open(problem / "scores" / "pixel.safetensors").matrix
            rows = slice(*GROUPS[group])
            read = matrix**2 if readout == "squared" else matrix
            expected = lds(read[rows], truth.masks, outputs[:, rows])
            assert row["lds"] == pytest.approx(100 * expected.mean, rel=1e-4)
            assert row["interval"] == pytest.approx([100 * end for end in expected.interval], rel=1e-4)
            published = [row["published"]["mean"], row["published"]["std"]]
            assert published == pytest.approx([100 * expected.bootstrap_mean, 100 * expected.bootstrap_std], rel=1e-4)
            if (name, readout) == ("pixel", "signed"):
                assert "difference" not in row
            else:
                between = lds_difference(read[rows], pixel[rows], truth.masks, outputs[:, rows])
                assert row["difference"]["lds"] == pytest.approx(100 * between.mean, rel=1e-4)
                assert row["difference"]["interval"] == pytest.approx([100 * x for x in between.interval], rel=1e-4)
            assert f"{100 * expected.mean:.1f}" in told
    assert "validation: 4 queries, 12 subsets, target simple" in told and "from pixel" in told
    assert "lambda=0.1" in told and "D=64" not in next(line for line in told.splitlines() if "Raw pixel" in line)


def test_differences_are_from_the_best_unless_asked(problem, tmp_path, succeeds):
    succeeds("evaluate", "lds", problem, "--json", tmp_path / "x.json")
    for group in GROUPS:
        rows = [row for (g, _, _), row in numbers(tmp_path / "x.json").items() if g == group]
        best = max(rows, key=lambda row: row["lds"])
        assert "difference" not in best
        assert all(
            row["difference"]["from"] == best["name"] and row["difference"]["lds"] <= 0
            for row in rows
            if row is not best
        )


def test_files_instead_of_a_folder(problem, tmp_path, succeeds):
    truth = problem / "evaluation.safetensors"
    pixel = problem / "scores" / "pixel.safetensors"
    told = succeeds("evaluate", "lds", "--truth", truth, pixel, "--json", tmp_path / "x.json")
    assert "all: 6 queries" in told
    assert list(numbers(tmp_path / "x.json")) == [("all", "pixel", "signed")]
    assert "generated: 2 queries" in succeeds(
        "evaluate", "lds", "table", "--truth", truth, pixel, "--queries", problem / "queries.json"
    )


def test_targets_are_those_of_the_ground_truth(problem, tmp_path, succeeds, fails):
    """One that dattri made has a loss of its own, as has one of bergson."""
    truth, pixel = GroundTruth.open(problem / "evaluation.safetensors"), problem / "scores" / "pixel.safetensors"
    torch.save(torch.from_numpy(-truth.outputs("elbo")), tmp_path / "target_values_lds.pt")
    torch.save(torch.from_numpy(np.stack([mask.nonzero()[0] for mask in truth.masks])), tmp_path / "indices_lds.pt")
    path = tmp_path / "dattri.safetensors"
    read_dattri(tmp_path, num_images=IMAGES).save(path)
    command = ["evaluate", "lds", pixel, "--json", tmp_path / "x.json", "--truth"]
    assert "12 subsets, target loss" in succeeds(*command, path)
    (row,) = numbers(tmp_path / "x.json", "loss").values()
    expected = lds(Scores.open(pixel).matrix, truth.masks, truth.outputs("elbo"))
    assert row["lds"] == pytest.approx(100 * expected.mean, rel=1e-4)
    succeeds(*command, path, "-t", "loss", "--plots", tmp_path / "plots")
    assert (tmp_path / "plots" / "lds-loss.png").exists()
    fails(f"--target must be one of loss of {path}, got simple", *command, path, "-t", "simple")
    # The simple loss wherever it stands, and else the first.
    for targets, default in ((("elbo", "simple"), "simple"), (("l1", "elbo"), "l1")):
        dataclasses.replace(truth, targets=targets).save(path)
        succeeds(*command, path)
        assert list(json.loads((tmp_path / "x.json").read_text())["targets"]) == [default]


@pytest.mark.parametrize("on_benchmark", [False, True])
def test_what_was_chosen_is_told_of_a_single_row(problem, tmp_path, succeeds, on_benchmark):
    """Each half of the validation queries suits its own file; one file suits all generated ones."""
    folds, paths = two_folds(4), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        matrix = -noisy(0, 0)
        suited = np.append(folds == number, [number == 0] * 2)
        matrix[suited] *= -1
        settings = {"lambda": [0.1 + 0.2, 12345.678][number]}
        Scores.of("X", matrix, TRAIN, ASKED, signed=True, settings=settings).save(path)
    told = succeeds(
        "evaluate", "lds", "--truth", problem / "evaluation.safetensors", *paths, "--queries", problem / "queries.json",
        "--tune", "lambda", *(["--tune-on-benchmark"] if on_benchmark else []),
    )  # fmt: skip
    lines = [" ".join(line.split()) for line in told.splitlines() if line.startswith("X ")]
    if on_benchmark:
        assert any(f"X lambda={value}, tuned on the benchmark" in lines[0] for value in ("0.3", "12345.7"))
        assert "X lambda=0.3, tuned on the benchmark" in lines[1]
    else:
        # What suits the second half is chosen for the first.
        assert "X lambda=[12345.7, 0.3], tuned on other queries" in lines[0]
        assert "X lambda=0.3, tuned on other queries" in lines[1]


def test_a_setting_is_chosen_on_other_queries(problem, tmp_path, succeeds):
    (problem / "scores" / "dtrak" / "3.safetensors").rename(tmp_path / "3.safetensors")
    try:
        told = succeeds("evaluate", "lds", problem, "--tune", "lambda", "--json", tmp_path / "x.json")
        published = succeeds(
            "evaluate", "lds", problem, "--tune", "lambda", "--tune-on-benchmark", "--json", tmp_path / "y.json"
        )
    finally:
        (tmp_path / "3.safetensors").rename(problem / "scores" / "dtrak" / "3.safetensors")
    truth = GroundTruth.open(problem / "evaluation.safetensors")
    grid = {
        MATRICES[name][2]["lambda"]: Scores.open(problem / "scores" / f"{name}.safetensors").matrix
        for name in ("dtrak/1", "dtrak/2")
    }
    for group, (start, end) in GROUPS.items():  # each on its own queries
        some = {value: matrix[start:end] for value, matrix in grid.items()}
        expected = tune_on_split(some.items(), truth.masks, truth.outputs()[:, start:end])
        assert (expected.folds == two_folds(end - start)).all()
        row = numbers(tmp_path / "x.json")[group, "dtrak/1", "signed"]
        assert row["lds"] == pytest.approx(100 * expected.mean, rel=1e-4)
        assert row["interval"] == pytest.approx([100 * end for end in expected.interval], rel=1e-4)
        assert row["tuned"] == "tuned on other queries" and "tuned on other queries" in told
        assert row["curve"] == [
            [0.1, pytest.approx(100 * expected.curve[0.1], rel=1e-4)],
            [1.0, pytest.approx(100 * expected.curve[1.0], rel=1e-4)],
        ]
    assert numbers(tmp_path / "y.json")["validation", "dtrak/1", "signed"]["tuned"] == "tuned on the benchmark"
    assert "tuned on the benchmark" in published


def test_each_readout_has_a_value_of_its_own(problem, tmp_path, succeeds):
    # The squares of the first file and the signs of the second are what predicts.
    (tmp_path / "scores").mkdir()
    (tmp_path / "evaluation.safetensors").write_bytes((problem / "evaluation.safetensors").read_bytes())
    good = noisy(0, 0)
    signs = np.random.default_rng(0).choice([-1, 1], good.shape)
    root = np.sqrt(good - good.min()) * signs
    for name, matrix, value in (("a", root, [1, 2]), ("b", good, [3])):
        Scores.of("X", matrix, TRAIN, ASKED, signed=True, settings={"steps": value}).save(
            tmp_path / "scores" / f"{name}.safetensors"
        )
    told = succeeds(
        "evaluate", "lds", tmp_path, "--tune", "steps", "-r", "signed", "-r", "squared", "--json", tmp_path / "x.json"
    )
    found = {key[2]: row["settings"]["steps"] for key, row in numbers(tmp_path / "x.json").items()}
    assert found == {"signed": [3], "squared": [1, 2]}
    assert "steps=[3], tuned on other queries / steps=[1, 2], tuned on other" in " ".join(told.split())


def test_each_group_has_a_value_of_its_own(problem, tmp_path, succeeds):
    # The one file knows the validation queries, the other the generated ones.
    (tmp_path / "scores").mkdir()
    for name in ("evaluation.safetensors", "queries.json"):
        (tmp_path / name).write_bytes((problem / name).read_bytes())
    for name, known, value in (("a", slice(0, 4), 1), ("b", slice(4, 6), 2)):
        matrix = noisy(7, 5.0) - noisy(0, 0)
        matrix[known] = noisy(0, 0)[known]
        Scores.of("X", matrix, TRAIN, ASKED, signed=True, settings={"steps": value}).save(
            tmp_path / "scores" / f"{name}.safetensors"
        )
    succeeds("evaluate", "lds", tmp_path, "--tune", "steps", "--json", tmp_path / "x.json")
    found = {group: row["settings"]["steps"] for (group, _, _), row in numbers(tmp_path / "x.json").items()}
    assert found == {"validation": 1, "generated": 2}


def test_all_values_of_a_setting_are_of_these_training_images(problem, pyattr, tmp_path):
    places = [problem / "scores" / "dtrak" / "1.safetensors", tmp_path / "2.safetensors"]
    method, matrix, settings = MATRICES["dtrak/2"]
    Scores.of(method, matrix, TRAIN.flip(0), ASKED, signed=True, settings=settings).save(places[1])
    result = pyattr("evaluate", "lds", "--truth", problem / "evaluation.safetensors", *places, "--tune", "lambda")
    told = "Scores: D-TRAK scored other training images than those of the ground truth, or in another order"
    assert (result.exit_code, result.stderr) == (1, f"pyattr: {told}\n")


def test_one_query_has_no_halves(problem, pyattr, tmp_path):
    (tmp_path / "queries.json").write_text('{"alone": [0, 1]}')
    result = pyattr("evaluate", "lds", problem, "--queries", tmp_path / "queries.json", "--tune", "lambda")
    told = "Scoreboard: to tune lambda, alone must have two queries, one for each half, got one"
    assert (result.exit_code, result.stderr) == (1, f"pyattr: {told}\n")


def test_scores_without_a_whole_group_are_told_of(problem, tmp_path, succeeds):
    path = tmp_path / "half.safetensors"
    method, matrix, _ = MATRICES["pixel"]
    Scores.of(method, matrix, TRAIN, ASKED, signed=True, settings={}).take(slice(1, 3)).save(path)
    told = succeeds(
        "evaluate", "lds", "--truth", problem / "evaluation.safetensors", path, "--queries", problem / "queries.json"
    )
    assert "half is in no table: its queries are not all of validation or generated" in told


def test_pictures(problem, tmp_path, succeeds):
    told = succeeds(
        "evaluate", "lds", problem, "--plots", tmp_path / "plots", "-r", "signed", "-r", "head", "--percent", 50
    )
    made = {path.name for path in (tmp_path / "plots").iterdir()}
    assert made == {
        "lds.png", "lds-against-lambda.png", "predictions.png", "images-dtrak-1.png", "images-pixel.png"
    }  # fmt: skip
    assert all((tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in made)
    assert all(f"picture  {tmp_path / 'plots' / name}" in told for name in made)


def test_pictures_of_every_target(problem, tmp_path, succeeds):
    told = succeeds("evaluate", "lds", problem, "--plots", tmp_path / "plots", "-t", "simple", "-t", "elbo")
    made = {path.name for path in (tmp_path / "plots").iterdir()}
    each = {f"{name}{ending}.png" for name in ("lds", "lds-against-lambda", "predictions") for ending in ("", "-elbo")}
    # Of each method the best file by each target.
    assert made == each | {"images-dtrak-1.png", "images-dtrak-2.png", "images-pixel.png"}
    assert all(told.count(f"{tmp_path / 'plots' / name}\n") == 1 for name in made)
    for name in ("lds", "predictions"):
        one, other = ((tmp_path / "plots" / f"{name}{ending}.png").read_bytes() for ending in ("", "-elbo"))
        assert one != other
    # The second target alone has the same name.
    succeeds("evaluate", "lds", problem, "--plots", tmp_path / "again", "-t", "elbo")
    assert (tmp_path / "again" / "lds-elbo.png").exists() and not (tmp_path / "again" / "lds.png").exists()


def test_both_spellings_of_a_readout(problem, tmp_path, succeeds):
    told = [
        succeeds("evaluate", "lds", problem, "-r", "signed", "-r", name, "--json", tmp_path / f"{name}.json")
        for name in ("signed-squared", "signed_squared")
    ]
    assert "signed-squared" in told[0] and "signed_squared" not in told[1].replace("signed_squared.json", "")
    one, other = (json.loads((tmp_path / f"signed{_}squared.json").read_text()) for _ in "-_")
    assert one == other and {row["readout"] for row in one["targets"]["simple"]["validation"]} == {
        "signed", "signed_squared"
    }  # fmt: skip


def test_what_has_no_sign_is_not_read_out(problem, tmp_path, succeeds):
    """The file of a method that is a square, as ProbedDAS, beside one of scores with a sign."""
    truth, paths = problem / "evaluation.safetensors", [problem / "scores" / "pixel.safetensors"]
    paths.append(tmp_path / "probed.safetensors")
    sizes = noisy(8, 1.0) ** 2
    Scores.of("ProbedDAS", sizes, TRAIN, ASKED, signed=False, settings={"D": 64}).save(paths[1])
    command = ["evaluate", "lds", "--truth", truth, *paths, "--json", tmp_path / "x.json"]
    told = succeeds(*command, "-r", "squared", "-r", "signed", "--plots", tmp_path / "plots", "--against", "probed")
    found = numbers(tmp_path / "x.json")
    assert set(found) == {("all", "pixel", "squared"), ("all", "pixel", "signed"), ("all", "probed", "signed")}
    judge = GroundTruth.open(truth)
    expected = lds(Scores.open(paths[1]).matrix, judge.masks, judge.outputs())
    row = found["all", "probed", "signed"]
    assert row["lds"] == pytest.approx(100 * expected.mean, rel=1e-4) and row["plain"] is False
    assert found["all", "pixel", "squared"]["difference"]["from"] == "probed"
    assert found["all", "pixel", "squared"]["plain"] is True
    (line,) = [line for line in told.splitlines() if line.startswith("ProbedDAS")]
    assert line.split()[1:3] == ["–", f"{100 * expected.mean:.1f}"]  # squared comes first
    why = "no readout of probed: such scores have no sign, or were read out already; they "
    assert why + "stand once, as they are, under signed" in told
    assert (tmp_path / "plots" / "lds.png").exists()
    # Under other readouts alone it is in no table, and said to be in none.
    told = succeeds(*command, "-r", "signed-squared", "--plots", tmp_path / "plots")
    assert why + "are left out without --readout signed" in told
    assert set(numbers(tmp_path / "x.json")) == {("all", "pixel", "signed_squared")}
    assert "no readout" not in succeeds(*command)


def test_signed_and_unsigned_files_are_no_values_of_one_setting(problem, tmp_path, fails):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, signed in zip(paths, (True, False), strict=True):
        Scores.of("DAS", noisy(2, 1) ** 2, TRAIN, ASKED, signed=signed, settings={"K": int(signed)}).save(path)
    fails(
        "--tune K: no two files of scores differ in that setting alone",
        "evaluate", "lds", "--truth", problem / "evaluation.safetensors", *paths, "--tune", "K",
    )  # fmt: skip


def test_a_setting_is_chosen_where_lambda_follows_from_it(problem, tmp_path, succeeds):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        settings = {"K": number, "lambda": 0.1 + number, "chosen": {"lambda": "automatically"}}
        Scores.of("TRAK", noisy(number, 1), TRAIN, ASKED, signed=True, settings=settings).save(path)
    command = ["evaluate", "lds", "--truth", problem / "evaluation.safetensors", *paths, "--tune", "K"]
    succeeds(*command, "--tune-on-benchmark", "--json", tmp_path / "x.json")
    (row,) = numbers(tmp_path / "x.json").values()
    assert row["settings"] == {"lambda": "chosen automatically", "K": row["settings"]["K"]}
    assert [value for value, _ in row["curve"]] == [0, 1]


def test_a_pool_is_no_judge_of_what_it_taught(problem, tmp_path, fails):
    truth = GroundTruth.open(problem / "evaluation.safetensors")
    path = tmp_path / "taught.safetensors"
    Scores.of("Datamodel", noisy(2, 1), TRAIN, ASKED, signed=True, settings={}, pool=truth).save(path)
    fails(
        "taught: Datamodel has asked models of this ground truth's subsets and knows their losses: score by a pool of its own, "
        "of `pyattr evaluate lds build --pool retraining`",
        "evaluate", "lds", "--truth", problem / "evaluation.safetensors", path,
    )  # fmt: skip
