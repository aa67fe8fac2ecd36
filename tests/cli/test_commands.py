"""The commands from images to report on a toy of 8 x 8 pixels."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyattr import attribution, diffusion
from pyattr.cli import app
from pyattr.cli.options import DataOptions, TrainOptions
from pyattr.cli.stages import Training, load_data, pixel_cosine
from pyattr.cli.workspace import Workspace
from pyattr.diffusion.train import WEIGHTINGS

TRAIN = ["--steps", "3", "--batch-size", "8", "--ema", "0.9", "--threads", "1", "--device", "cpu"]
SCORE = ["--num-timesteps", "2", "--proj-dim", "16", "--batch-size", "8", "--threads", "1", "--device", "cpu"]


def pyattr(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = pyattr(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def fails(line, *arguments, code=1):
    """The command fails with exactly this line and leaves its output folder as it was."""
    before = contents(arguments)
    result = pyattr(*arguments)
    assert (result.exit_code, result.stderr) == (code, f"pyattr: {line}\n")
    assert contents(arguments) == before


def contents(arguments):
    """The files and folders in the output folder of a command, and when they were written."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else Path("pyattr-run")
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}


def arrays(path):
    with np.load(path) as archive:
        return dict(archive)


def folders(out):
    return {path.name for path in out.iterdir() if path.is_dir()}


def half_written(out):
    return [path for path in out.rglob("*") if path.name.endswith(".part")]


def shown(page):
    """(query, method, kind) -> [(index, score)] of the report."""
    found = {}
    for article in re.findall(r"<article.*?</article>", page, re.S):
        query = int(re.search(r'data-query="(\d+)"', article)[1])
        for section in re.findall(r'<section class="method.*?</section>', article, re.S):
            method = re.search(r'data-method="([^"]+)"', section)[1]
            for kind, index, score in re.findall(
                r'<li class="tile (\w+)" data-index="(\d+)" data-score="([^"]+)"', section
            ):
                found.setdefault((query, method, kind), []).append((int(index), float(score)))
    return found  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 noisy images in two classes, as a folder."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(0, 80, (8, 8), np.uint8)
        pixels[:4] += np.uint8(150) if number % 2 else np.uint8(0)
        (folder / ("dark", "light")[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / ("dark", "light")[number % 2] / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An output folder after train, generate and attribute."""
    out = tmp_path_factory.mktemp("finished") / "out"
    succeeds("train", images, "--out", out, *TRAIN)
    succeeds("generate", "--out", out, "-n", 3, "--steps", 2, "--device", "cpu")
    succeeds("attribute", "--out", out, "--top", 4, "-m", "dtrak", "-m", "pixels", *SCORE)
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def replaced(monkeypatch, *names):
    """Make functions fail that must not be called."""

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    for module, name in names:
        monkeypatch.setattr(module, name, forbidden)


# What comes out


def test_the_results_are_those_of_the_library(images, finished):
    scores = arrays(finished / "scores.npz")
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    train = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    torch.manual_seed(0)
    model = diffusion.unet("mnist-small", channels=1, size=8)
    schedule = diffusion.Schedule()
    torch.set_num_threads(1)
    diffusion.train(model, train, schedule=schedule, steps=3, batch_size=8, ema=0.9)
    samples = diffusion.sample(model, schedule, num_images=3, steps=2)
    np.testing.assert_array_equal(scores["queries"], samples.uint8().numpy())
    method = attribution.DTRAK(model, schedule, num_timesteps=2, proj_dim=16, batch_size=8).fit(train)
    expected = method.scores(samples.uint8(), ids=attribution.QUERY_IDS + samples.ids).numpy()
    np.testing.assert_allclose(scores["scores"], expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(scores["scores_2"], pixel_cosine(scores["queries"], train))
    order = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(scores["proponents"], order[:, :4])
    np.testing.assert_array_equal(scores["opponents"], order[:, ::-1][:, :4])
    assert scores["methods"].tolist() == ["D-TRAK", "Pixel cosine"]
    assert scores["labels"].tolist() == [0] * 12 + [1] * 12 and scores["class_names"].tolist() == ["dark", "light"]
    assert scores["ids"].tolist() == [f"{file.parent.name}/{file.name}" for file in files]
    settings = json.loads(str(scores["settings"]))
    assert settings["train"]["steps"] == 3 and settings["generate"]["steps"] == 2
    assert settings["methods"][0]["lambda"] == method.lambda_


def test_the_report_shows_the_scores(finished):
    scores = arrays(finished / "scores.npz")
    page = (finished / "report.html").read_text()
    found = shown(page)
    for q in range(3):
        row = scores["scores"][q]
        for kind, sign in (("proponent", 1), ("opponent", -1)):
            columns = [n for n in scores[f"{kind}s"][q].tolist() if sign * row[n] > 0]
            assert found.get((q, "D-TRAK", kind), []) == [(n, float(row[n])) for n in columns]
        best = np.argsort(-scores["scores_2"][q], kind="stable")[:4].tolist()
        assert found[q, "Pixel cosine", "proponent"] == [(n, float(scores["scores_2"][q, n])) for n in best]
    for told in ("mnist-small", "3 × 8", "DDIM", "lambda", "2 of 1,000 timesteps", "Generated image 2"):
        assert told in page, told
    main = json.loads(str(scores["settings"]))["methods"][0]
    assert f"an effective dimension of {main['effective dimension'] / 16:.0%} of the number of eigenvalues" in page
    assert "raised the likelihood" in page and "Which training images made these" in page


def test_a_report_of_pixels_speaks_of_pixels(out):
    succeeds("attribute", "--out", out, "-m", "pixels", "--top", 4, "--device", "cpu")
    page = (out / "report.html").read_text()
    for told in ("Which training images look like these", "how alike the two look", "compares pixels alone",
                 "Labels of the images shown"):  # fmt: skip
        assert told in page, told
    for told in ("likelihood", "Lambda", "retrained", "gradients", "Labels of its proponents"):
        assert told not in page, told


def test_images_lie_beside_the_samples(finished):
    folder = next(finished.glob("generate-*"))
    queries = arrays(finished / "scores.npz")["queries"]
    for number in range(3):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"image-{number:05d}.png")), queries[number, 0])


def test_nothing_is_left_behind(finished):
    assert half_written(finished) == []
    assert {path.name for path in finished.iterdir() if path.is_file()} == {
        ".lock",
        "run.json",
        "report.html",
        "scores.npz",
    }


# What is computed again


def test_a_second_run_computes_nothing(out, images, monkeypatch):
    from pyattr.diffusion import features, sampling

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    replaced(monkeypatch, (features.FeatureMap, "batch"), (sampling._Sampler, "run"), (attribution.TRAK, "fit"))
    monkeypatch.setattr("torch.optim.AdamW.step", None)
    assert "found" in succeeds("train", "--data", images, "--out", out, *TRAIN)
    succeeds("generate", "--out", out, "-n", 3, "--steps", 2, "--device", "cpu")
    told = succeeds("attribute", "--out", out, "--top", 4, "-m", "dtrak", "-m", "pixels", *SCORE)
    assert told.count("found") == 3 and "to do" not in told
    for path, time in before.items():
        if path.parent != out:
            assert path.stat().st_mtime_ns == time, path


def test_a_changed_option_recomputes_only_what_depends_on_it(out, monkeypatch):
    from pyattr.diffusion import features

    before = folders(out)
    # Another lambda: only new scores; features are found.
    replaced(monkeypatch, (features.FeatureMap, "batch"))
    first = arrays(out / "scores.npz")["scores"]
    succeeds("attribute", "--out", out, "--top", 4, "--lambda", 1e-3, *SCORE)
    new = folders(out) - before
    assert [re.sub("-[0-9a-f]+$", "", name) for name in new] == ["dtrak-scores"]
    assert not np.array_equal(arrays(out / "scores.npz")["scores"], first)
    assert "was given as 0.001" in (out / "report.html").read_text()
    monkeypatch.undo()
    # Another width: new features and scores; the model and the images are found.
    before = folders(out)
    succeeds("attribute", "--out", out, *SCORE[:2], "--proj-dim", 8, *SCORE[4:])
    assert sorted(re.sub("-[0-9a-f]+$", "", name) for name in folders(out) - before) == [
        "dtrak-features",
        "dtrak-scores",
    ]


def test_other_generated_images_need_no_new_features(out):
    before = folders(out)
    succeeds("generate", "--out", out, "-n", 1, "--steps", 2, "--seed", 5, "--device", "cpu")
    succeeds("attribute", "--out", out, *SCORE)
    assert sorted(re.sub("-[0-9a-f]+$", "", name) for name in folders(out) - before) == ["dtrak-scores", "generate"]
    assert arrays(out / "scores.npz")["scores"].shape == (1, 24)


def test_a_changed_image_is_other_data(out, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images/dark/00.png")
    before = folders(out)
    succeeds("train", "--data", tmp_path / "images", "--out", out, *TRAIN)
    assert len(folders(out) - before) == 1


# Queries and models from elsewhere


def test_given_queries_and_a_given_checkpoint(finished, images, tmp_path):
    checkpoint = max(next(finished.glob("train-*")).glob("checkpoint-*"))
    out = tmp_path / "out"
    succeeds("attribute", "--out", out, "--data", images, "--checkpoint", checkpoint, "--queries", images / "light",
             "-m", "trak", *SCORE)  # fmt: skip
    scores = arrays(out / "scores.npz")
    assert scores["scores"].shape == (12, 24) and scores["methods"].tolist() == ["TRAK"]
    page = (out / "report.html").read_text()
    assert "12</b> query images" in page and "01.png" in page and "Generated" not in page
    told = succeeds(
        "generate", "--out", out, "--checkpoint", checkpoint.parent, "-n", 1, "--steps", 1, "--device", "cpu"
    )
    assert "images" in told


def test_no_report(finished, images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    checkpoint = max(next(finished.glob("train-*")).glob("checkpoint-*"))
    arguments = ["attribute", "--out", tmp_path / "out", "--data", images, "--checkpoint", checkpoint, "--queries", images,
                 "-m", "pixels", *SCORE]  # fmt: skip
    fails("report: needs the package jinja2: install pyattr[report]", *arguments)
    assert not (tmp_path / "out").exists()  # said before any work
    succeeds(*arguments, "--no-report")
    assert (tmp_path / "out/scores.npz").exists() and not (tmp_path / "out/report.html").exists()


def test_pixel_cosine_by_hand():
    images = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], np.uint8).reshape(4, 1, 1, 2)  # mean (2, 2)
    queries = np.array([[2, 5], [2, 2]], np.uint8).reshape(2, 1, 1, 2)  # (0, 3) and (0, 0) from the mean
    half = np.sqrt(0.5)
    np.testing.assert_allclose(pixel_cosine(queries, images), [[-half, -half, half, half], [0, 0, 0, 0]], atol=1e-7)


# Bad input


def test_bad_data(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    kinds = "bmp gif jpeg jpg pgm png ppm tif tiff webp"
    fails(f"data: no images in {tmp_path}/empty: put image files ({kinds}) there or in its sub-folders",
          "train", "--data", tmp_path / "empty", "--out", out)  # fmt: skip
    (tmp_path / "mixed").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "mixed/a.png")
    Image.new("L", (8, 12)).save(tmp_path / "mixed/b.png")
    fails(f"data: images of different sizes in {tmp_path}/mixed: a.png is 8x8, b.png is 8x12: "
          "give --size 8 to resize and crop them all to one size",
          "demo", "--data", tmp_path / "mixed", "--out", out)  # fmt: skip
    (tmp_path / "mixed/b.png").write_bytes((tmp_path / "mixed/a.png").read_bytes()[:50])
    result = pyattr("train", "--data", tmp_path / "mixed", "--out", out)
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"pyattr: data: cannot read image {tmp_path}/mixed/b.png \(.*\): repair or remove the file\n", result.stderr
    )
    assert folders(out) == set()


def test_images_that_do_not_fit_the_network(tmp_path):
    np.savez(tmp_path / "wide.npz", images=np.zeros((4, 8, 12), np.uint8))
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 10, 10), np.uint8))
    for name, size in (("wide", "8x12"), ("odd", "10x10")):
        fails("the network mnist-small needs square images whose side is a multiple of 4, "
              f"got {size}: give --size 8", "train", "--data", tmp_path / f"{name}.npz", "--out", tmp_path / "out")  # fmt: skip
    fails("unet: name must be one of cifar, celeba, mnist-small, got 'big'",
          "train", "--data", tmp_path / "odd.npz", "--network", "big", "--out", tmp_path / "out")  # fmt: skip


def test_what_is_missing_is_said_with_what_to_do(tmp_path, images, finished):
    out = tmp_path / "out"
    told = f"no trained model in {out}: run `pyattr train SOURCE --out {out}` first, or give --checkpoint"
    fails(told, "generate", "--out", out)
    fails(told, "attribute", "--out", out)
    fails(f"no checkpoint at {tmp_path}/nothing: give a file or folder that `pyattr train` wrote, or train a model first",
          "generate", "--out", out, "--checkpoint", tmp_path / "nothing")  # fmt: skip
    (tmp_path / "folder").mkdir()
    fails(f"no checkpoint at {tmp_path}/folder: give a file or folder that `pyattr train` wrote, or train a model first",
          "attribute", "--out", out, "--checkpoint", tmp_path / "folder")  # fmt: skip
    checkpoint = max(next(finished.glob("train-*")).glob("checkpoint-*"))
    fails(f"no images of this model in {out} to attribute: give --queries, or run `pyattr generate --out {out}` first",
          "attribute", "--out", out, "--checkpoint", checkpoint)  # fmt: skip
    fails(f"the training images of {checkpoint} are not known: give --data",
          "attribute", "--out", out, "--checkpoint", checkpoint, "--queries", images)  # fmt: skip
    np.savez(tmp_path / "colour.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    fails("data: queries are 3×8×8 and training images 1×8×8: they must have the same size and channels",
          "attribute", "--out", out, "--checkpoint", checkpoint, "--data", images,
          "--queries", tmp_path / "colour.npz")  # fmt: skip


def test_images_that_the_model_was_not_trained_on(out, images, tmp_path):
    """Those of the last training are the default, as long as they are what they were."""
    source = tmp_path / "copy"
    shutil.copytree(images, source)
    succeeds("train", source, "--out", out, *TRAIN)  # the same pixels: found
    checkpoint = max(next(out.glob("train-*")).glob("checkpoint-*"))
    attribute = ["attribute", "--out", out, "-m", "pixels", *SCORE]
    queries = ["--queries", images / "dark"]
    succeeds(*attribute, "--checkpoint", checkpoint, *queries)  # the folder's own model
    assert "not those" not in (out / "report.html").read_text()
    first = source / "dark/00.png"
    Image.fromarray(255 - np.asarray(Image.open(first))).save(first)
    changed = (f"{source} has changed since the model was trained on it: train again, put the images back, "
               "or give --data to score the images as they are now")  # fmt: skip
    fails(changed, *attribute)
    fails(changed, *attribute, "--checkpoint", checkpoint, *queries)
    told = (
        "The scored images are not those that the model was trained on, so the scores cannot tell what made the model."
    )
    assert told in succeeds(*attribute, "--data", source)
    assert told in (out / "report.html").read_text()
    assert told not in succeeds(*attribute, "--data", images)
    assert told not in (out / "report.html").read_text()
    # A model from elsewhere was not trained on what was last used here.
    shutil.copy(checkpoint, tmp_path / "other.safetensors")
    fails(f"the training images of {tmp_path}/other.safetensors are not known: give --data",
          *attribute, "--checkpoint", tmp_path / "other.safetensors", *queries)  # fmt: skip


def test_images_that_the_model_cannot_take(out, tmp_path):
    for shape, given, hint in (
        ((3, 32, 32), "1×32×32", "give --size 8, or the images that it was trained on"),
        ((3, 8, 8, 3), "3×8×8", "give the images that it was trained on"),
    ):
        np.savez(tmp_path / "x.npz", images=np.zeros(shape, np.uint8))
        fails(f"data: the images are {given} and those of the model 1×8×8: {hint}",
              "attribute", "--out", out, "--data", tmp_path / "x.npz", *SCORE)  # fmt: skip


def test_a_model_is_used_with_the_schedule_it_was_trained_with(images, tmp_path):
    schedule = diffusion.Schedule(100, 1e-3, 0.1)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    path, out = tmp_path / "model.safetensors", tmp_path / "out"
    diffusion.save_model(path, model)
    generate = ["generate", "--out", out, "--checkpoint", path, "-n", 2, "--threads", 1, "--device", "cpu"]
    fails(f"{path} does not say with which noise schedule its model was trained: "
          "write it again by pyattr.diffusion.save_model(path, model, schedule=...)", *generate, "--steps", 2)  # fmt: skip
    diffusion.save_model(path, model, schedule=schedule)
    fails("sample: steps must lie in [1, 100], got 101", *generate, "--steps", 101)
    succeeds(*generate, "--steps", 2)
    torch.set_num_threads(1)
    samples = diffusion.sample(model, schedule, num_images=2, steps=2)
    picture = np.asarray(Image.open(next(out.glob("generate-*")) / "image-00001.png"))
    np.testing.assert_array_equal(picture, samples.uint8()[1, 0].numpy())
    told = succeeds("attribute", "--out", out, "--checkpoint", path, "--data", images, "--limit", 4, *SCORE)
    assert "does not say on which images it was trained" in told
    scores = arrays(out / "scores.npz")
    train = np.stack([np.asarray(Image.open(images / name)) for name in scores["ids"]])[:, None]
    method = attribution.DTRAK(model, schedule, num_timesteps=2, proj_dim=16, batch_size=8).fit(train)
    expected = method.scores(samples.uint8(), ids=attribution.QUERY_IDS + samples.ids).numpy()
    np.testing.assert_allclose(scores["scores"], expected, rtol=1e-4, atol=1e-9)
    assert json.loads(str(scores["settings"]))["schedule"]["num_timesteps"] == 100
    assert "2 of 100 timesteps" in (out / "report.html").read_text()


def test_damaged_files_are_named(out):
    checkpoint = max(next(out.glob("train-*")).glob("checkpoint-*"))
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)
    fails(
        f"{checkpoint} is damaged (its checksum does not match): delete it and make it again", "generate", "--out", out
    )
    checkpoint.write_bytes(b"nothing")
    result = pyattr("generate", "--out", out)
    assert result.exit_code == 1 and f"{checkpoint} is damaged" in result.stderr and result.stderr.count("\n") == 1


def test_damaged_scores_are_named(out):
    path = next(out.glob("dtrak-scores-*")) / "scores.npz"
    path.write_bytes(path.read_bytes()[:-30])
    fails(f"{path} is damaged or missing: delete the folder {path.parent} and run again",
          "attribute", "--out", out, "--top", 4, *SCORE)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["attribute", "--method", "magic"],
            "Invalid value for --method: must be one of dtrak, trak, pixels, got magic",
        ),
        (
            ["attribute", "--limit", "3"],
            "Invalid value for --data: --size and --limit say how to read it: give it as well",
        ),
        (["train"], "Invalid value for SOURCE: give the training images once"),
        (["train", "a", "--data", "b"], "Invalid value for SOURCE: give the training images once"),
    ],
)
def test_wrong_use(arguments, line):
    fails(line, *arguments, code=2)


def test_options_that_are_not_possible_leave_nothing_behind(images, out, tmp_path):
    train = ["train", images, "--out", tmp_path / "new", "--device", "cpu"]
    fails("train: learning_rate must be positive, got -1.0", *train, "--learning-rate", -1)
    fails("train: ema must lie in (0, 1), got 1.0", *train, "--ema", 1)
    fails("train: weighting must be one of " + ", ".join(WEIGHTINGS) + ", got 'heavy'", *train, "--weighting", "heavy")
    generate = ["generate", "--out", out, "--device", "cpu"]
    fails("sample: method must be one of ddim, ddpm, got 'foo'", *generate, "--method", "foo")
    fails("sample: steps must lie in [1, 1000], got 2000", *generate, "--steps", 2000)
    fails("sample: eta must lie in [0, 1], and be 0 for ddpm, got 0.5", *generate, "--method", "ddpm", "--eta", 0.5)
    # Nor are the scores made of the method before the one that cannot be.
    attribute = ["attribute", "--out", out, "--queries", images / "dark", "-m", "pixels", "-m", "dtrak", *SCORE]
    fails("FeatureMap: strategy must be one of uniform, cumulative, got 'foo'", *attribute, "--strategy", "foo")
    fails("FeatureMap: num_timesteps must lie in [1, 1000], got 2000", *attribute, "--num-timesteps", 2000)
    for number in ("-1.0", "0.0", "inf", "nan"):
        fails(f"attribute: lambda must be positive and finite, got {number}", *attribute, "--lambda", number)


def test_devices(images, tmp_path):
    fails("--device must be auto, cpu, cuda or cuda:NUMBER, got abacus",
          "train", "--data", images, "--out", tmp_path / "out", "--device", "abacus")  # fmt: skip
    if not torch.cuda.is_available():
        fails("--device cuda: torch sees 0 GPUs: use --device cpu",
              "train", "--data", images, "--out", tmp_path / "out", "--device", "cuda")  # fmt: skip


# A full disk


def test_a_disk_without_room_is_refused_at_the_start(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, 10**6))
    result = pyattr("train", "--data", images, "--out", tmp_path / "out", *TRAIN)
    assert result.exit_code == 1
    assert re.fullmatch(rf"pyattr: the disk of {tmp_path}/out is too full: what is to be done takes about \d+ MB, 1 MB are "
                        "free: free some space, or choose another folder with --out\n", result.stderr)  # fmt: skip
    assert folders(tmp_path / "out") == set()


def test_room_that_the_interrupted_run_has_taken_is_not_asked_for_again(images, tmp_path, monkeypatch):
    out, train = tmp_path / "out", ["train", images, *TRAIN]
    with Workspace(tmp_path / "empty") as workspace:
        needed = Training(workspace, load_data(DataOptions(str(images))), TrainOptions(ema=0.9)).size

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion.Training, "__init__", interrupt)  # when all steps are done
    assert pyattr(*train, "--out", out).exit_code == 130
    monkeypatch.undo()
    taken = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert taken > needed / 4
    free = needed - taken // 2 + 20 * 10**6
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, free))
    assert "is too full" in pyattr(*train, "--out", tmp_path / "new").stderr
    succeeds(*train, "--out", out)


def test_a_disk_that_fills_at_any_write_loses_nothing(finished, images, tmp_path, monkeypatch):
    """The disk takes one write, then two, then three in each attempt; in the end all is as if it had never been full."""
    checkpoint = max(next(finished.glob("train-*")).glob("checkpoint-*"))
    arguments = ["attribute", "--data", images, "--limit", 4, "--checkpoint", checkpoint, "--queries", images / "dark",
                 "--top", 2, *SCORE, "--num-timesteps", 1]  # fmt: skip
    sync, expected = os.fsync, tmp_path / "expected"
    succeeds(*arguments, "--out", expected)
    out, failures = tmp_path / "out", 0
    while True:
        room = failures

        def full(handle):
            nonlocal room
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= 1
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        result = pyattr(*arguments, "--out", out)
        monkeypatch.setattr(os, "fsync", sync)
        assert half_written(out) == []
        if result.exit_code == 0:
            break
        failures += 1
        assert (result.exit_code, result.stderr) == (
            1, "pyattr: the disk is full: free some space, then run the same command again to go on from here\n"
        )  # fmt: skip
        assert failures < 30
    assert failures > 4
    assert folders(out) == folders(expected)
    found, wanted = arrays(out / "scores.npz"), arrays(expected / "scores.npz")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# info, demo


def test_info_lists_every_op_and_backend():
    from pyattr import backends

    told = " ".join(re.sub(r"[│┃━┏┓┡┩└┘─┴┳╇]", " ", succeeds("info")).split())
    for op, states in backends.report().items():
        assert op in told and {"cuda", "triton", "cpu", "reference"} == set(states)
    assert "usable" in told and f"torch {torch.__version__}" in told and "SIMD level" in told


def test_the_demo_runs_all_stages(tmp_path):
    out = tmp_path / "demo"
    told = succeeds("demo", "--quick", "--out", out, "--threads", 1)
    assert "60 images of 1×28×28, 10 classes from mnist_5k" in told and "6/6" in told
    scores = arrays(out / "scores.npz")
    assert scores["scores"].shape == (2, 60) and scores["methods"].tolist() == ["D-TRAK", "TRAK"]
    assert np.bincount(scores["labels"]).tolist() == [6] * 10
    found = shown((out / "report.html").read_text())
    for number, method in (("", "D-TRAK"), ("_2", "TRAK")):
        for q in range(2):
            row = scores[f"scores{number}"][q]
            expected = [n for n in np.argsort(-row, kind="stable")[:10].tolist() if row[n] > 0]
            assert found[q, method, "proponent"] == [(n, float(row[n])) for n in expected]
    assert "demonstration made in minutes" in (out / "report.html").read_text()
    # The folder serves the other commands: all that they need is remembered.
    succeeds("attribute", "--out", out, "-m", "pixels", "--device", "cpu")
    assert arrays(out / "scores.npz")["methods"].tolist() == ["Pixel cosine"]
