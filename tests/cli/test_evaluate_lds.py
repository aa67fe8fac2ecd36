"""`pyattr evaluate lds`: the table, its numbers and pictures, from files that were made here."""

import json

import numpy as np
import pytest
import safetensors.torch
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
        (["x", "--readout", "mean"], "--readout: must be one of signed, squared, signed-squared, head, got mean"),
        (["x", "--percent", "3"], "--percent: goes with --readout head, got 3 alone"),
        (["x", "--percent", "3", "-r", "squared"], "--percent: goes with --readout head, got 3 alone"),
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
    (tmp_path / "queries.json").write_text('{"a": [0, 6')
    fails(f"{tmp_path / 'queries.json'} is damaged: delete it and run again")
    (tmp_path / "queries.json").write_text('{"a": [0, 6]}')
    (tmp_path / "images.npz").write_bytes(b"PK")
    fails(f"{tmp_path / 'images.npz'} is damaged or missing: put it back or delete it")
    np.savez(tmp_path / "images.npz", train_images=TRAIN)
    fails(
        f"{tmp_path / 'images.npz'} must hold the training images and queries of the ground truth: put them back or delete it"
    )
    assert not (tmp_path / "plots").exists()
    truth = tmp_path / "evaluation.safetensors"
    truth.write_bytes((content := truth.read_bytes())[:-1] + b"x")
    fails(f"{truth} is damaged (its checksum does not match): delete it and make it again")
    truth.write_bytes(content)
    Scores.of("A", MATRICES["pixel"][1], TRAIN.flip(0), ASKED, signed=True, settings={}).save(
        tmp_path / "scores" / "a.safetensors"
    )
    fails("Scores: A scored other training images than those of the ground truth, or in another order")


def test_nobody_is_told_to_delete_what_they_named(problem, tmp_path, fails):
    """Files of another kind, and damaged ones, are said to be what they are."""
    truth, pixel = problem / "evaluation.safetensors", problem / "scores" / "pixel.safetensors"
    archive, other, mine = problem / "images.npz", tmp_path / "other.safetensors", tmp_path / "mine.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    mine.write_bytes(truth.read_bytes()[:-1] + b"x")
    command = ["evaluate", "lds", "--truth"]
    wanted = "--truth must be a ground truth, as `pyattr evaluate lds build` writes it, got"
    fails(f"{wanted} {archive}, which is an .npz archive", *command, archive, pixel)
    fails(f"{wanted} {other}, which is a safetensors file that pyattr did not write", *command, other, pixel)
    fails(f"{wanted} {mine}, which is damaged (its checksum does not match)", *command, mine, pixel)
    fails(f"GroundTruth: {pixel} does not hold a ground truth: it is a file of kind 'scores'", *command, pixel, pixel)
    wanted = "scores must be files of pyattr.evaluation.Scores or archives of `pyattr attribute`, got"
    queries = problem / "queries.json"
    (tmp_path / "cut.safetensors").write_bytes(queries.read_bytes())
    told = f"{tmp_path}/cut.safetensors, which is a JSON file"
    fails(f"{wanted} {told}", *command, truth, tmp_path / "cut.safetensors")
    mine.write_bytes(pixel.read_bytes()[:-1] + b"x")
    fails(f"{wanted} {mine}, which is damaged (its checksum does not match)", *command, truth, mine)
    for path, told in ((archive, "an .npz archive"), (truth, "a safetensors file"), (tmp_path / "text", "no JSON")):
        if path.name == "text":
            path.write_text("validation: 0 to 4")
        wanted = f'{path} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got {told}'
        fails(wanted, *command, truth, pixel, "--queries", path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("{}", "{}"),
        ("[[0, 6]]", "[[0, 6]]"),
        ("null", "null"),
        ('{"a": [true, 3]}', "a [true, 3]"),
        ('{"a": [0, true]}', "a [0, true]"),
        ('{"a": [0, 3], "b": [3, 3]}', "b [3, 3]"),
        ('{"a": [0.0, 3]}', "a [0.0, 3]"),
        ('{"a": 3}', "a 3"),
    ],
)
def test_ranges_that_are_none(problem, tmp_path, fails, content, got):
    path = tmp_path / "ranges.json"
    path.write_text(content)
    line = f'{path} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got {got}'
    fails(line, "evaluate", "lds", problem, "--queries", path)
