"""`pyattr evaluate lds`: the table, its numbers and pictures, from files that were made here."""

import json

import numpy as np
import pytest
import torch

from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, Scores, lds, lds_difference, subsets, tune_on_split, two_folds
from pyattr.evaluation.ground_truth import image_hashes

SUBSETS, IMAGES, QUERIES = 12, 16, 6
GROUPS = {"validation": [0, 4], "generated": [4, 6]}
PIXELS = np.random.default_rng(0).integers(0, 256, (IMAGES + QUERIES, 1, 8, 8), dtype=np.uint8)
TRAIN, ASKED = torch.from_numpy(PIXELS[:IMAGES]), torch.from_numpy(PIXELS[IMAGES:])


def noisy(seed, much):
    true = np.random.default_rng(1).standard_normal((QUERIES, IMAGES))
    return (true + much * np.random.default_rng(seed).standard_normal(true.shape)).astype(np.float32)


MATRICES = {
    "dtrak/1": ("D-TRAK", noisy(2, 0.3), {"lambda": 0.1, "D": 64}),
    "dtrak/2": ("D-TRAK", noisy(3, 1.0), {"lambda": 1.0, "D": 64}),
    "dtrak/3": ("D-TRAK", noisy(4, 1.5), {"lambda": 10.0, "D": 64}),
    "pixel": ("Raw pixel", noisy(5, 4.0), {}),
}


def save(folder, name, rows=slice(None)):
    method, matrix, settings = MATRICES[name]
    path = folder / "scores" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    Scores.of(method, matrix, TRAIN, ASKED, signed=True, settings=settings).take(rows).save(path)
    return path


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    masks, rng = subsets(IMAGES, SUBSETS), np.random.default_rng(6)
    exact = -(masks @ noisy(0, 0).T)
    losses = np.stack([exact + rng.standard_normal(exact.shape), exact + 5 * rng.standard_normal(exact.shape)])
    truth = GroundTruth(
        masks, losses[:, :, None, None], ("simple", "elbo"), np.arange(QUERIES), data_hash(TRAIN),
        tuple(image_hashes(ASKED)), {},
    )  # fmt: skip
    truth.save(folder / "evaluation.safetensors")
    (folder / "queries.json").write_text(json.dumps(GROUPS))
    np.savez(folder / "images.npz", train_images=TRAIN, validation_images=ASKED[:4], generated_images=ASKED[4:])
    for name in MATRICES:
        save(folder, name, rows=slice(4, None) if name == "dtrak/3" else slice(None))
    return folder


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
    expected = tune_on_split(grid.items(), truth.masks, truth.outputs(), folds=two_folds(QUERIES))
    row = numbers(tmp_path / "x.json")["validation", "dtrak/1", "signed"]
    assert row["lds"] == pytest.approx(100 * expected.per_query[:4].mean(), rel=1e-4)
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


NOTHING = (
    "give a folder that holds evaluation.safetensors and scores/, as in `pyattr evaluate lds FOLDER`, or --truth FILE and "
    "files of scores; got "
)
OF_VALIDATION = "of the queries validation: give one of dtrak/1, dtrak/2"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], NOTHING + "nothing"),
        (["nowhere"], NOTHING + "nowhere"),
        (["--truth", "x"], "no scores to judge: give files of scores after --truth FILE"),
        (["{0}", "--target", "l1"], "GroundTruth: target must be one of simple, elbo, got 'l1'"),
        (["{0}", "--tune", "eta"], "--tune eta: no two files of scores differ in that setting alone"),
        (["{0}", "--against", "D-TRAK"], f"--against D-TRAK names several rows {OF_VALIDATION}"),
        (["{0}", "--against", "TRAK"], f"--against TRAK names no row {OF_VALIDATION}, pixel"),
    ],
)
def test_refusals(problem, pyattr, arguments, line):
    result = pyattr("evaluate", "lds", *(argument.format(problem) for argument in arguments))
    assert (result.exit_code, result.stderr) == (1, f"pyattr: {line}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x", "--target", "l3"], "--target: must be one of simple, elbo, square, l1, linf, got l3"),
        (["x", "--readout", "mean"], "--readout: must be one of signed, squared, signed_squared, head, got mean"),
        (["x", "--tune-on-benchmark"], "--tune-on-benchmark: say which setting is chosen: give --tune"),
    ],
)
def test_options_that_are_wrong(pyattr, arguments, line):
    result = pyattr("evaluate", "lds", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"pyattr: Invalid value for {line}\n")


def test_build_is_a_command_and_no_folder(pyattr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    result = pyattr("evaluate", "lds", "build")
    assert (result.exit_code, result.stderr) == (2, "pyattr: Missing argument 'OUT'.\n")
    assert "build holds no evaluation.safetensors" in pyattr("evaluate", "lds", "./build").stderr


def test_what_lies_in_the_folder_is_checked(problem, tmp_path, pyattr):
    def fails(line):
        result = pyattr("evaluate", "lds", tmp_path, "--plots", tmp_path / "plots")
        assert (result.exit_code, result.stderr) == (1, f"pyattr: {line}\n")

    fails(f"{tmp_path} holds no evaluation.safetensors: make it by `pyattr evaluate lds build {tmp_path} ...`")
    (tmp_path / "evaluation.safetensors").write_bytes((problem / "evaluation.safetensors").read_bytes())
    fails(
        f"{tmp_path} holds no scores: run `pyattr attribute --out {tmp_path}`, or keep some in {tmp_path / 'scores'} by "
        "pyattr.evaluation.Scores.save"
    )
    save(tmp_path, "pixel")
    (tmp_path / "queries.json").write_text('{"a": [0, 7]}')
    fails(
        f'{tmp_path / "queries.json"} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got a [0, 7]'
    )
    (tmp_path / "queries.json").write_text('{"a": [0, 6]}')
    (tmp_path / "images.npz").write_bytes(b"PK")
    fails(f"{tmp_path / 'images.npz'} is damaged or missing: put it back or delete it")
    np.savez(tmp_path / "images.npz", train_images=TRAIN)
    fails(
        f"{tmp_path / 'images.npz'} must hold the training images and queries of the ground truth: put them back or delete it"
    )
    assert not (tmp_path / "plots").exists()
    Scores.of("A", MATRICES["pixel"][1], TRAIN.flip(0), ASKED, signed=True, settings={}).save(
        tmp_path / "scores" / "a.safetensors"
    )
    fails("Scores: A scored other training images than those of the ground truth, or in another order")
