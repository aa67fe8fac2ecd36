"""The benchmark of the linear datamodeling score: what is drawn, trained and committed."""

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
import torch

from bench.lds import __main__ as command
from bench.lds import ablations, build, costs, deletion, methods, problem, scores, tables
from bench.lds.problem import PROBLEMS
from pyattr.attribution import DTRAK, TRAK
from pyattr.diffusion import checkpoints, load_model
from pyattr.diffusion.progress import silent
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import Counterfactuals, GroundTruth, Scores, lds, two_folds
from pyattr.evaluation.ground_truth import image_hashes

NAMES = sorted(PROBLEMS)


@pytest.fixture
def digits(tmp_path):
    """An archive of 28 x 28 images in which each class has a grey value of its own."""
    rng, found = np.random.default_rng(0), {}
    for part, count in (("train", 3000), ("test", 300)):
        labels = rng.integers(0, 10, count)
        found[f"{part}_labels"] = labels.astype(np.uint8)
        found[f"{part}_images"] = np.repeat(20 * labels + 7, 784).reshape(count, 28, 28).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", **found)
    return tmp_path / "digits.npz"


def test_images_are_drawn_in_equal_parts_with_their_labels(digits):
    drawn = PROBLEMS["mnist"].draw(digits)
    for part, count in (("train", 1000), ("validation", 100)):
        images, labels = drawn[f"{part}_images"], drawn[f"{part}_labels"]
        assert images.shape == (count, 1, 16, 16) and images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count // 10] * 10
        # The middle is the class's grey, the margin of one pixel (two of 32, halved) black.
        assert (images[:, 0, 1:-1, 1:-1] == (20 * labels + 7)[:, None, None]).all()
        assert not images[:, :, [0, -1]].any() and not images[:, :, :, [0, -1]].any()


def test_pixels_are_means_of_two_by_two():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 2:4, 4:6, 1] = [[1, 2], [3, 200]]
    small = problem._small(images)
    assert small[0, 1, 1, 2] == round((1 + 2 + 3 + 200) / 4)
    assert small.sum() == small[0, 1, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_known_to_the_processes_that_train_them(name):
    build = pickle.loads(pickle.dumps(PROBLEMS[name].network))
    x = torch.zeros(2, PROBLEMS[name].channels, 16, 16)
    assert build()(x, torch.tensor([0, 999])).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_committed_ground_truth_belongs_to_the_committed_images(name):
    found = build.images(PROBLEMS[name])
    truth = GroundTruth.open(PROBLEMS[name].folder / "evaluation.safetensors")
    assert np.array_equal(truth.masks, PROBLEMS[name].masks(found["train_labels"], "evaluation"))
    assert truth.losses.shape[1:] == (PROBLEMS[name].models, PROBLEMS[name].seeds, 1, 200)
    assert truth.images == data_hash(torch.from_numpy(found["train_images"]))
    assert truth.queries == tuple(image_hashes(build.queries(PROBLEMS[name])))
    assert np.isfinite(truth.losses).all()


@pytest.mark.parametrize("name", NAMES)
def test_generated_queries_come_from_the_committed_network(name):
    made = build.sampled(PROBLEMS[name], "noise", silent).images[:4]
    found = build.images(PROBLEMS[name])["generated_images"][:4]
    bytes_made = ((made.clamp(-1, 1) + 1) * 127.5).round()
    # Sampling amplifies rounding; another processor may move a pixel by a step or two.
    assert (bytes_made - torch.from_numpy(found).float()).abs().mean() < 1


def test_everything_is_made_and_goes_on(digits, tmp_path, monkeypatch):
    """The whole of it in small: few images, few steps, few dimensions."""
    monkeypatch.setattr(problem, "HERE", tmp_path)
    for module in (methods, ablations):
        monkeypatch.setattr(module, "DIM", 64)
    for name, value in (
        ("IMAGES", 20),
        ("VALIDATION", 10),
        ("GENERATED", 3),
        ("FULL_STEPS", 4),
        ("SUBSET_STEPS", 1),
        ("TIMESTEPS", 2),
        ("POOL", 12),
    ):
        monkeypatch.setattr(problem, name, value)
    small = dataclasses.replace(PROBLEMS["mnist"], models=3)
    build.draw(small, digits)
    build.main_model(small, tmp_path / "work", silent)
    assert [path.name for path in build.main_checkpoints(small)] == [
        f"main-{step:04d}.safetensors" for step in (1, 2, 3, 4)
    ]
    assert build.queries(small).shape == (13, 1, 16, 16)
    truth = build.retrain(small, "evaluation", tmp_path / "work", 1, silent)
    assert truth.losses.shape == (5, 3, 1, 1, 13)
    pool = build.retrain(small, "retraining", tmp_path / "work", 1, silent)
    assert pool.masks.shape == (12, 20) and not np.array_equal(pool.masks[:3], truth.masks)
    half = load_model(small.folder / "models" / "half-3.safetensors")
    kept = load_model(tmp_path / "work" / "retraining" / "models" / "model-0003-00.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), kept.parameters(), strict=True))
    again = build.retrain(small, "evaluation", tmp_path / "work", 1, silent)
    kept = GroundTruth.open(small.folder / "evaluation.safetensors")
    assert np.array_equal(again.losses, truth.losses) and np.array_equal(kept.losses, truth.losses)

    # Of other timesteps there is a file of its own, of losses of the same models; all else stays.
    before = {path: path.read_bytes() for path in small.folder.rglob("*") if path.is_file()}
    for stage, committed in (("evaluation", truth), ("retraining", pool)):
        other = build.retrain(small, stage, tmp_path / "work", 1, silent, timesteps=3)
        assert other.settings["evaluation"]["timesteps"] == 3 and other.losses.shape == committed.losses.shape
        assert {**other.settings, "evaluation": None} == {**committed.settings, "evaluation": None}
        assert not np.array_equal(other.losses, committed.losses)
        assert np.array_equal(GroundTruth.open(small.folder / f"{stage}-3.safetensors").losses, other.losses)
        (small.folder / f"{stage}-3.safetensors").unlink()
    assert {path: path.read_bytes() for path in small.folder.rglob("*") if path.is_file()} == before
    # The benchmark's own number is no other.
    assert np.array_equal(
        build.retrain(small, "evaluation", tmp_path / "work", 1, silent, timesteps=2).losses, truth.losses
    )
    assert {path for path in small.folder.rglob("*") if path.is_file()} == before.keys()

    scores.write(small, tmp_path / "work", ["similarity", "2", "retrained"], silent)
    made = methods.Materials(small, tmp_path / "work", silent)
    found = {path.stem: Scores.open(path) for path in (small.folder / "scores").iterdir()}
    assert len(found) == 6 + 4 + 2 * 5 + 2
    for name, given in found.items():
        generated = name.startswith("journey")
        assert given.rows_in(truth).tolist() == list(range(10 * generated, 13))
        assert given.matrix.shape == (3 if generated else 13, 20) and np.isfinite(given.matrix).all()
    chosen = {"lambda": found["trak-2"].settings["lambda"], "chosen": {"lambda": "automatically"}}
    assert found["trak-2"].settings == {"timesteps": 2, "D": 64, **chosen}
    assert found["trak-2-tuned"].settings["lambda"] == scores.TUNED and "chosen" not in found["trak-2-tuned"].settings
    # Which lambdas there were, and which of them each half of the queries took: its scores are those at that lambda.
    method = TRAK(made.model, problem.SCHEDULE, **made.options(2, "simple")).fit(made.images)
    lambdas = [float(method.eigenvalues[0]) * value for value in methods.LAMBDAS]
    at = dict(method.scores_grid(made.queries, lambdas))
    told = found["trak-2-tuned"].tuned["lambda"]
    assert told["grid"] == lambdas and told["chosen"].keys() == {"validation", "generated"}
    for group, start, end in (("validation", 0, 10), ("generated", 10, 13)):
        for fold, value in enumerate(told["chosen"][group]):
            rows = start + np.flatnonzero(two_folds(end - start) == fold)
            np.testing.assert_allclose(found["trak-2-tuned"].matrix[rows], at[value][rows], rtol=1e-3, atol=1e-6)
    assert list(found["journey-trak-2-tuned"].tuned["lambda"]["chosen"]) == ["generated"]
    assert all((given.tuned != {}) == name.endswith("-tuned") for name, given in found.items())

    for module, name, value in (
        (ablations, "TIMESTEPS", (1, 2)),
        (ablations, "PUBLISHED", (2,)),
        (ablations, "DIMS", (16, 64)),
        (deletion, "DIM", 64),
        (deletion, "FEW", 2),
        (deletion, "QUERIES", 2),
        (deletion, "REMOVED", 5),
    ):
        monkeypatch.setattr(module, name, value)
    materials = methods.Materials(small, tmp_path / "work", silent)
    results = {group: ablations.judged(materials, group) for group in ("sizes", "ensembles", "cells")}
    assert {result["truth"] for result in results.values()} == {scores.truth_hash(truth)}
    sizes, ensembles, cells = (result["variants"] for result in results.values())
    told: list[dict] = [{"timesteps": 1, "D": 64}, {"timesteps": 2, "D": 16}, {"timesteps": 2, "D": 64}]
    told.append({"timesteps": 2, "D": 64, "solve": "float32"})
    assert [entry["settings"] for entry in sizes] == 2 * told
    assert [entry["method"] for entry in sizes] == ["TRAK"] * 4 + ["D-TRAK"] * 4
    assert [entry["settings"]["half models"] for entry in ensembles] == 2 * [1, 2, 4]
    # The cells of single pixels are the pixels; what is left without them would be nothing, and is not asked.
    pixels = list(ablations.cells(materials))
    assert [variant.settings for variant in pixels] == [entry["settings"] for entry in cells]
    assert pixels[4].settings == {"means of": "16 x 16 cells"} and len(pixels) == 5 + 4 + 1
    ((_, alone),) = pixels[4].grid
    assert np.allclose(alone, found["raw-pixel-cosine"].matrix, atol=1e-3)  # kept in float16
    # The mean of the scores of the first two models, each at the same share of its own largest eigenvalue.
    variants = {variant.settings["half models"]: list(variant.grid) for variant in ablations.ensembles(materials)}
    second = load_model(small.folder / "models" / "half-1.safetensors").eval()
    other = list(ablations.grid(ablations.pair(materials, 10, "square", second, network="half-1")))
    for one, two, (_, more) in zip(variants[1], variants[2], other, strict=True):
        assert one[0] == two[0] and torch.allclose(two[1], (one[1] + more) / 2, atol=1e-6 * float(more.abs().max()))
    # Of what DAS adds, the square is taken of the same numbers, and weights are one for each column.
    plain, *added = (list(variant.grid) for variant in ablations.das(materials))
    for (value, base), *others in zip(plain, *added, strict=True):
        assert [other[0] for other in others] == [value] * 3
        squares, residuals, leverage = (other[1] for other in others)
        assert torch.equal(squares, base.square())
        for weighed in (residuals, leverage):
            weights = weighed.double() / base
            assert (weights > 0).all() and torch.allclose(weights, weights[:1].expand_as(weights), rtol=1e-4)
            assert not torch.equal(weighed, base)

    for _ in range(2):  # the second time all of it is there
        deletion.remove(small, tmp_path / "work", 1, silent)
    outcome = Counterfactuals.open(small.folder / deletion.RESULT)
    assert outcome.methods == ("TRAK", "D-TRAK", "D-TRAK, squared", "raw pixel, cosine", "random")
    trained = load_model(checkpoints(tmp_path / "work" / "main")[problem.FULL_STEPS]).eval()
    given = DTRAK(trained, problem.SCHEDULE, num_timesteps=2, proj_dim=64, batch_size=32).fit(materials.images)
    values = given.scores(outcome.originals)
    for number, matrix in ((1, values), (2, values.square())):
        taken = outcome.removed[number, 0]
        assert taken.sum(1).tolist() == [5, 5]
        assert all(matrix[q][taken[q]].min() >= matrix[q][~taken[q]].max() for q in range(2))
    deletion.pictures(small, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"deletion-mnist.png", "deletion-mnist-images.png"}
    assert deletion.table(small).count("\n") == 6


def test_reliability_is_the_rank_correlation_of_models_of_the_same_subsets(monkeypatch):
    monkeypatch.setattr(problem, "VALIDATION", 2)
    monkeypatch.setattr(problem, "GENERATED", 1)
    # Four subsets, two models of each: the same order, the opposite order, and one exchange of neighbours.
    first = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    second = np.array([[10.0, 20, 30, 40], [4, 3, 2, 1], [2, 1, 3, 4]])
    losses = np.stack([first.T, second.T], 1)[None, :, :, None]  # [1, 4, 2, 1, 3]
    truth = GroundTruth(
        masks=np.eye(4, dtype=bool),
        losses=losses,
        targets=("simple",),
        query_ids=np.arange(3),
        images=None,
        queries=None,
        settings={},
    )
    monkeypatch.setattr(tables.GroundTruth, "open", lambda path: truth)
    lines = tables.reliability(PROBLEMS["mnist"]).splitlines()
    assert lines[2].endswith("| 0.0 | 80.0 |")
    # 2 * 0.8 / 1.8 = 0.889, whose root is 0.943.
    assert lines[3].endswith("| 0.0 | 88.9 |") and lines[4].endswith("| 0.0 | 94.3 |")
    monkeypatch.setattr(tables.GroundTruth, "open", lambda path: dataclasses.replace(truth, losses=losses[:, :, :1]))
    assert tables.reliability(PROBLEMS["mnist"]) == ""


def test_costs_are_counted_and_measured(tmp_path, monkeypatch):
    folder = tmp_path / "cifar2"
    folder.mkdir()
    for name in ("images.npz", "models"):
        (folder / name).symlink_to(PROBLEMS["cifar2"].folder / name)
    monkeypatch.setattr(problem, "HERE", tmp_path)
    for name, value in (("TRAIN", 6), ("QUERIES", 2), ("TIMESTEPS", 2), ("SOME", 4), ("MANY", 3), ("STEPS", 1)):
        monkeypatch.setattr(costs, name, value)
    monkeypatch.setattr(costs, "METHODS", {name: costs.METHODS[name] for name in ("RawPixel", "TRAK")})
    (tmp_path / "work").mkdir()
    # Times of so few images say nothing, and are refused where they contradict themselves.
    monkeypatch.setattr(costs, "_units", lambda materials: costs.Units(0.5, 2.0, 0.25, 8.0))
    costs.measure(PROBLEMS["cifar2"], tmp_path / "work")
    rows = costs.table(PROBLEMS["cifar2"]).splitlines()
    assert [row.split(" | ")[0] for row in rows[4:]] == ["| RawPixel", "| TRAK", "| Datamodel, 64 models of 500 images"]
    units = costs.Units(gradient=0.5, projection=2.0, forward=0.25, step=8.0)
    # 8 images: 2 timesteps and a projection each.
    assert costs.METHODS["TRAK"][0](units) == 8 * 3.0


def test_each_half_of_the_queries_is_scored_at_the_lambda_that_is_best_for_the_other(monkeypatch):
    """Of two lambdas one is right for some queries and wrong for the others, whichever half they are in."""
    monkeypatch.setattr(problem, "VALIDATION", 8)
    monkeypatch.setattr(problem, "GENERATED", 6)
    rng = np.random.default_rng(0)
    masks, right = rng.random((20, 30)) < 0.5, rng.standard_normal((14, 30)).astype(np.float32)
    folds = np.concatenate([two_folds(8), two_folds(6)])
    # Lambda 1 suits fold 0 of the validation images and fold 1 of the generated ones; lambda 2 the other two.
    suits = np.where(np.arange(14) < 8, folds == 0, folds == 1)
    grid = [(1.0, torch.from_numpy(np.where(suits[:, None], right, -right)))]
    grid.append((2.0, -grid[0][1]))
    truth = GroundTruth(
        masks=masks,
        losses=-(masks @ right.T)[None, :, None, None, :],
        targets=("simple",),
        query_ids=np.arange(14),
        images=None,
        queries=None,
        settings={},
    )
    found = scores.Found("some", grid[0][1], lambda: iter(grid))
    tuned, choice = scores.tuned_scores(found, truth)
    # Each half takes what suits the other, which is wrong for itself.
    assert np.array_equal(tuned.numpy(), -right)
    assert choice == {"grid": [1.0, 2.0], "chosen": {"validation": [2.0, 1.0], "generated": [1.0, 2.0]}}
    some = scores.Found("some", grid[0][1][8:], lambda: ((v, m[8:]) for v, m in grid), queries=slice(8, 14))
    tuned, choice = scores.tuned_scores(some, truth)
    assert np.array_equal(tuned.numpy(), -right[8:]) and choice["chosen"] == {"generated": [1.0, 2.0]}


@pytest.mark.parametrize("name", NAMES)
def test_committed_scores_are_of_the_committed_queries(name):
    truth = GroundTruth.open(PROBLEMS[name].folder / "evaluation.safetensors")
    found = {path.stem: Scores.open(path) for path in (PROBLEMS[name].folder / "scores").iterdir()}
    assert {"trak-10", "d-trak-10", "raw-pixel-cosine"} <= set(found)
    for given in found.values():
        rows = given.rows_in(truth)
        assert rows.tolist() in (list(range(200)), list(range(100, 200)))
        assert np.isfinite(given.matrix).all()
        # Nothing rests on an older ground truth, and similarities have no sign.
        assert given.settings.get("truth", scores.truth_hash(truth)) == scores.truth_hash(truth)
        assert ("truth" in given.settings) == given.method.endswith(", tuned")
        assert given.signed == (not given.method.startswith(("raw pixel", "classifier", "NDA", "DAS, probed")))
    for path in (PROBLEMS[name].folder / "ablations").glob("*.json"):
        assert json.loads(path.read_text())["truth"] == scores.truth_hash(truth), path.name
    # What the page of the benchmark says of the published order.
    first, second = (lds(found[key].matrix, truth.masks, truth.outputs()) for key in ("d-trak-10", "trak-10"))
    assert first.minus(second).interval.low > 0 and second.interval.low > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_hold_the_tables_of_the_committed_scores(name):
    rows = tables.judged(PROBLEMS[name])
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.fill(text, PROBLEMS[name], rows) == text
    assert f"<!-- lds:{name} -->\n| method" in (tables.ROOT / "docs" / "lds-benchmark.md").read_text()


def test_timesteps_of_the_stages_that_retrain(monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr(build, "retrain", lambda problem, stage, *rest: given.append((problem.name, stage, rest[-1])))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.lds", *map(str, arguments)])
        command.main()

    for stage, more, expected in (
        ("evaluation", [], None), ("evaluation", ["--timesteps", 1000], 1000), ("retraining", ["--timesteps", 7], 7)
    ):  # fmt: skip
        run(stage, "mnist", "--work", tmp_path, *more)
        assert given.pop() == ("mnist", stage, expected)
    for stage, number, line in (
        ("evaluation", 1001, "--timesteps must lie in [1, 1000], got 1001"),
        ("evaluation", 0, "--timesteps must lie in [1, 1000], got 0"),
        ("scores", 1000, "--timesteps goes with evaluation or retraining, got scores"),
    ):
        with pytest.raises(SystemExit):
            run(stage, "mnist", "--work", tmp_path, "--timesteps", number)
        assert capsys.readouterr().err.endswith(f"error: {line}\n") and not given


def test_both_pixel_methods_are_compared():
    """D-TRAK and TRAK stand against pixels as they are and with the mean image taken off, in both data sets."""
    for name in NAMES:
        lines = tables.differences(tables.judged(PROBLEMS[name])).splitlines()
        for method in ("TRAK", "D-TRAK"):
            for pixels in ("raw pixel, cosine", "raw pixel, cosine, centred"):
                assert sum(line.startswith(f"| {method}, tuned, K=100 above {pixels} |") for line in lines) == 1
