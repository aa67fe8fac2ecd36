"""What comes out of the commands, and what is computed again."""

import json
import re
import shutil

import numpy as np
import torch
from PIL import Image
from toy_runs import SCORE, TRAIN

from pyattr import attribution, diffusion
from pyattr.cli.options import DataOptions, PatchOptions
from pyattr.cli.scoring import PatchScoring, listed
from pyattr.cli.stages import load_data
from pyattr.cli.workspace import Workspace
from pyattr.diffusion.storage import load_tensors


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


def replaced(monkeypatch, *names):
    """Make functions fail that must not be called."""

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    for module, name in names:
        monkeypatch.setattr(module, name, forbidden)


# What comes out


def test_the_results_are_those_of_the_library(images, finished, arrays):
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
    cosines = attribution.RawPixel("cosine", centre=True).fit(train).scores(scores["queries"])
    np.testing.assert_array_equal(scores["scores_2"], cosines.numpy())
    order = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(scores["proponents"], order[:, :4])
    np.testing.assert_array_equal(scores["opponents"], order[:, ::-1][:, :4])
    assert scores["methods"].tolist() == ["D-TRAK", "Pixel cosine"]
    assert scores["labels"].tolist() == [0] * 12 + [1] * 12 and scores["class_names"].tolist() == ["dark", "light"]
    assert scores["ids"].tolist() == [f"{file.parent.name}/{file.name}" for file in files]
    settings = json.loads(str(scores["settings"]))
    assert settings["train"]["steps"] == 3 and settings["generate"]["steps"] == 2
    assert settings["methods"][0]["lambda"] == method.lambda_


def test_the_report_shows_the_scores(finished, arrays):
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


def test_a_report_of_pixels_speaks_of_pixels(out, succeeds):
    succeeds("attribute", "--out", out, "-m", "pixels", "--top", 4, "--device", "cpu")
    page = (out / "report.html").read_text()
    for told in ("Which training images look like these", "how alike the two look", "compares pixels alone",
                 "Labels of the images shown"):  # fmt: skip
        assert told in page, told
    for told in ("likelihood", "Lambda", "retrained", "gradients", "Labels of its proponents"):
        assert told not in page, told


def test_images_lie_beside_the_samples(finished, arrays):
    folder = next(finished.glob("generate-*"))
    queries = arrays(finished / "scores.npz")["queries"]
    for number in range(3):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"image-{number:05d}.png")), queries[number, 0])


def test_nothing_is_left_behind(finished, half_written):
    assert half_written(finished) == []
    assert {path.name for path in finished.iterdir() if path.is_file()} == {
        ".lock",
        "run.json",
        "report.html",
        "scores.npz",
    }


# What is computed again


def test_a_second_run_computes_nothing(out, images, monkeypatch, succeeds):
    from pyattr.diffusion import features, sampling

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    replaced(monkeypatch, (features.FeatureMap, "batch"), (sampling.Sampler, "run"), (attribution.TRAK, "fit"))
    monkeypatch.setattr("torch.optim.AdamW.step", None)
    assert "found" in succeeds("train", "--data", images, "--out", out, *TRAIN)
    succeeds("generate", "--out", out, "-n", 3, "--steps", 2, "--device", "cpu")
    told = succeeds("attribute", "--out", out, "--top", 4, "-m", "dtrak", "-m", "pixels", *SCORE)
    assert told.count("found") == 3 and "to do" not in told
    for path, time in before.items():
        if path.parent != out:
            assert path.stat().st_mtime_ns == time, path


def test_a_changed_option_recomputes_only_what_depends_on_it(out, monkeypatch, succeeds, arrays, folders):
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


def test_another_projection_is_the_librarys(out, images, succeeds, arrays, folders):
    before = folders(out)
    succeeds("attribute", "--out", out, "--projection", "sparse", *SCORE)
    assert len(folders(out) - before) == 2  # its own features and scores
    found = arrays(out / "scores.npz")
    model = diffusion.load_model(next(out.glob("train-*")))
    method = attribution.DTRAK(model, diffusion.Schedule(), num_timesteps=2, kind="sparse", proj_dim=16, batch_size=8)
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    train = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    ids = attribution.QUERY_IDS + np.arange(len(found["queries"]))
    expected = method.fit(train).scores(found["queries"], ids=ids)
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5, atol=1e-9)
    assert "sparse, to 16 numbers" in (out / "report.html").read_text()


def test_other_generated_images_need_no_new_features(out, succeeds, arrays, folders):
    before = folders(out)
    succeeds("generate", "--out", out, "-n", 1, "--steps", 2, "--seed", 5, "--device", "cpu")
    succeeds("attribute", "--out", out, *SCORE)
    assert sorted(re.sub("-[0-9a-f]+$", "", name) for name in folders(out) - before) == ["dtrak-scores", "generate"]
    assert arrays(out / "scores.npz")["scores"].shape == (1, 24)


def test_a_changed_image_is_other_data(out, images, tmp_path, succeeds, folders):
    shutil.copytree(images, tmp_path / "images")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images/dark/00.png")
    before = folders(out)
    succeeds("train", "--data", tmp_path / "images", "--out", out, *TRAIN)
    assert len(folders(out) - before) == 1


# NDA


def test_nda_is_that_of_the_library(out, images, succeeds, arrays):
    told = succeeds("attribute", "--out", out, "-m", "nda", "--patch-timesteps", 2, "--patch-k", 7, "--patch-noises", 2,
                    "--seed", 3, "--top", 4)  # fmt: skip
    assert "NDA scores" in told and "NDA matches" in told
    scores = arrays(out / "scores.npz")
    train = np.stack([np.asarray(Image.open(images / name)) for name in scores["ids"]])[:, None]
    method = attribution.NDA(timesteps=[250, 500], k=7, num_noises=2, noise_seed=3).fit(train)
    np.testing.assert_allclose(scores["scores"], method.scores(scores["queries"]), rtol=1e-6)
    assert scores["opponents"].shape == (3, 0)
    settings = json.loads(str(scores["settings"]))["methods"]
    assert settings == [
        {"name": "NDA", "method": "nda", "readout": {"name": "signed", "percent": None}}
        | {"num_timesteps": 2, "k": 7, "num_noises": 2, "seed": 3}
    ]
    # The page shows the regions that explain its three strongest images.
    page = (out / "report.html").read_text()
    for q, article in enumerate(re.findall(r"<article.*?</article>", page, re.S)):
        shown = [int(n) for n in re.findall(r'<figure class="pair" data-index="(\d+)"', article)]
        assert shown == np.argsort(-scores["scores"][q], kind="stable")[:3].tolist()
        explained = method.explain(scores["queries"][q], shown[0])
        share = 100 * explained.matches[0].weight / explained.score
        assert f"region 1: {share:.0f}% of the score of #{shown[0]}" in article
    for told in ("2 of 1,000: 250, 500", "the 7 best places", "Asks no model", "never looks at the model",
                 "Which training images hold the parts of these"):  # fmt: skip
        assert told in page, told
    assert "Lambda" not in page and "no training image has a negative" not in page


def test_nda_a_second_time_computes_nothing(out, monkeypatch, succeeds, folders):
    command = ["attribute", "--out", out, "-m", "nda", "--patch-timesteps", 1, "--patch-k", 3]
    succeeds(*command)
    before = folders(out)
    replaced(monkeypatch, (attribution.NDA, "compute"), (attribution.NDA, "explain"))
    assert succeeds(*command).count("found") == 2
    # Explanations alone are made again from the tables of the scores.
    monkeypatch.undo()
    replaced(monkeypatch, (attribution.NDA, "compute"))
    shutil.rmtree(next(out.glob("nda-matches-*")))
    succeeds(*command)
    assert folders(out) == before


def test_nda_asks_for_the_room_that_it_takes(images, tmp_path):
    data = load_data(DataOptions(str(images)))
    with Workspace(tmp_path / "out") as workspace:
        asked = PatchScoring(workspace, None, data, PatchOptions(num_timesteps=2)).plan("queries", 5)[0].size
    method = attribution.NDA(timesteps=[250, 500], directory=tmp_path / "tables").fit(data.images)
    taken = method.scores(data.images[:5]).nbytes
    for path in (tmp_path / "tables").rglob("*.safetensors"):
        taken += sum(tensor.nbytes for tensor in load_tensors(path)[0].values())
    assert taken <= asked <= 1.5 * taken


def test_methods_without_a_model_need_none(images, tmp_path, succeeds, fails, arrays):
    out = tmp_path / "out"
    arguments = ["attribute", "--out", out, "--data", images, "--queries", images / "light", "--patch-timesteps", 1]
    succeeds(*arguments, "-m", "nda", "-m", "pixels")
    scores = arrays(out / "scores.npz")
    assert scores["methods"].tolist() == ["NDA", "Pixel cosine"]
    # The queries are the bright training images: their pixels find themselves, their patches bright images.
    assert scores["scores_2"].argmax(1).tolist() == list(range(12, 24))
    assert scores["scores"][:, 12:].min() > scores["scores"][:, :12].max()
    told = f"no trained model in {out}: run `pyattr train SOURCE --out {out}` first, or give --checkpoint"
    fails(told, *arguments, "-m", "nda", "-m", "dtrak")
    told = (
        f"no trained model in {out}: give --data and --queries, enough for nda and pixels, or run `pyattr train SOURCE "
    )
    for given in (arguments[:3], arguments[:5], [*arguments[:3], *arguments[5:7]]):
        fails(f"{told}--out {out}` first", *given, "-m", "nda", "-m", "pixels")


# Queries and models from elsewhere


def test_given_queries_and_a_given_checkpoint(finished, images, tmp_path, succeeds, arrays):
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


def test_no_report(finished, images, tmp_path, monkeypatch, succeeds, fails):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    checkpoint = max(next(finished.glob("train-*")).glob("checkpoint-*"))
    arguments = ["attribute", "--out", tmp_path / "out", "--data", images, "--checkpoint", checkpoint, "--queries", images,
                 "-m", "pixels", "--device", "cpu"]  # fmt: skip
    fails("report: needs the package jinja2: install pyattr[report]", *arguments)
    assert not (tmp_path / "out").exists()  # said before any work
    succeeds(*arguments, "--no-report")
    assert (tmp_path / "out/scores.npz").exists() and not (tmp_path / "out/report.html").exists()


def test_timesteps_in_a_line():
    assert listed([7]) == "7" and listed([100, 200, 300, 400, 500]) == "100, 200, 300, 400, 500"
    assert listed(list(range(0, 700, 100))) == "0, 100, 200, 300, …, 600"  # a dot stands for what is left out alone


def test_methods_of_one_gradient_share_its_features(out, succeeds, arrays):
    methods = ["gradient-dot", "gradient-cosine", "relative-influence", "renormalized-influence", "trak"]
    told = succeeds("attribute", "--out", out, "--top", 2, *(x for m in methods for x in ("-m", m)), *SCORE)
    assert "1/6  TRAK features" in told and len(list(out.glob("trak-features-*"))) == 1
    assert not list(out.glob("gradient-*-features-*"))
    found = arrays(out / "scores.npz")
    settings = json.loads(str(found["settings"]))
    assert [m["name"] for m in settings["methods"]] == found["methods"].tolist()
    assert ["lambda" in m for m in settings["methods"]] == [False, False, True, True, True]
    assert [m.get("lambda") == settings["methods"][4]["lambda"] for m in settings["methods"][2:]] == [True] * 3
    dots, cosines, relative, renormalized, trak = (found[f"scores{n}"] for n in ("", "_2", "_3", "_4", "_5"))
    assert np.abs(cosines).max() <= 1 and not np.allclose(dots, trak)
    for divided in (relative, renormalized):
        divisors = trak / divided  # the same for all queries
        np.testing.assert_allclose(divisors, np.broadcast_to(divisors[0], divisors.shape), rtol=1e-3)
        assert (divisors > 0).all()
    lengths = np.abs(dots / cosines)  # |phi_q| |phi_n|
    np.testing.assert_allclose(
        lengths / lengths[:1], np.broadcast_to((lengths / lengths[:1])[:, :1], lengths.shape), rtol=1e-3
    )
    page = (out / "report.html").read_text()
    assert "what one step of descent on the one would do" in page and "divided by the length" in page


# info, demo


def test_info_lists_every_op_and_backend(succeeds):
    from pyattr import backends

    told = " ".join(re.sub(r"[│┃━┏┓┡┩└┘─┴┳╇]", " ", succeeds("info")).split())
    for op, states in backends.report().items():
        assert f"{op} {' '.join([*states][:1])} " in told  # the op, then the first of its backends
    for state in {reason for states in backends.report().values() for reasons in states.values() for reason in reasons}:
        assert state in told
    assert "usable" in told and f"torch {torch.__version__}" in told and "SIMD level" in told


def test_the_demo_runs_all_stages(tmp_path, succeeds, arrays):
    out = tmp_path / "demo"
    told = succeeds("demo", "--quick", "--out", out, "--threads", 1)
    assert "60 images of 1×28×28, 10 classes from mnist_5k" in told and "6/6" in told
    scores = arrays(out / "scores.npz")
    assert scores["scores"].shape == (2, 60) and scores["methods"].tolist() == ["D-TRAK", "NDA"]
    assert np.bincount(scores["labels"]).tolist() == [6] * 10
    found = shown((out / "report.html").read_text())
    for number, method in (("", "D-TRAK"), ("_2", "NDA")):
        for q in range(2):
            row = scores[f"scores{number}"][q]
            expected = [n for n in np.argsort(-row, kind="stable")[:10].tolist() if row[n] > 0]
            assert found[q, method, "proponent"] == [(n, float(row[n])) for n in expected]
    assert "demonstration made in minutes" in (out / "report.html").read_text()
    # The folder serves the other commands: all that they need is remembered.
    succeeds("attribute", "--out", out, "-m", "pixels", "--device", "cpu")
    assert arrays(out / "scores.npz")["methods"].tolist() == ["Pixel cosine"]
