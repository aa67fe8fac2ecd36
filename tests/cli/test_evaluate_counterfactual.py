"""`pyattr evaluate counterfactual` on an output folder of three digits' worth of work."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pyattr.evaluation import Counterfactuals

FAST = ["--timesteps", 3, "--epochs", 1, "--threads", 1, "--device", "cpu"]


def models(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("counterfactual-models-*/retrained-*")}


def outcomes(out):
    return [
        Counterfactuals.open(path) for path in sorted(out.glob("counterfactual-[0-9a-f]*/counterfactuals.safetensors"))
    ]


def test_a_folder_is_evaluated_and_added_to(out, succeeds, arrays):
    first = ["evaluate", "counterfactual", "--out", out, "-m", "dtrak", "-r", 4, "--queries", 2, *FAST]
    told = succeeds(*first)
    assert "done; 4 models trained, each without 4 of 24 images" in told and "without 4 of 24" in told
    found = json.loads((out / "counterfactual.json").read_text())
    figures = found["4 removed"]
    assert list(figures) == ["L2", "classifier cosine", "change of the loss (simple)"]
    assert list(figures["L2"]["methods"]) == ["D-TRAK", "random"]
    assert list(figures["L2"]["paired by query"]) == ["D-TRAK against random"]
    values = figures["L2"]["methods"]["D-TRAK"]["queries"]
    assert len(values) == 2 and figures["L2"]["methods"]["D-TRAK"]["median"] == pytest.approx(np.mean(values), rel=1e-4)
    for name in ("counterfactual-effects.png", "counterfactual-images.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 50
    # The images of the largest scores were removed, and the generated images compared with themselves.
    (made,) = [one for one in outcomes(out) if one.methods == ("D-TRAK", "random")]
    scores = arrays(out / "scores.npz")["scores"][:2]
    for q in range(2):
        assert set(made.removed[0, 0, q].nonzero()[:, 0].tolist()) == set(np.argsort(-scores[q])[:4].tolist())
    pixels = np.round((made.originals.numpy().clip(-1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(pixels, arrays(out / "scores.npz")["queries"][:2])
    # Again: nothing is trained. With another method and readout: what is there stays.
    kept = models(out)
    assert len(kept) == 5  # four, and what was taken of the original
    told = succeeds(*first)
    assert "found" in told and "to do" not in told and models(out) == kept
    assert json.loads((out / "counterfactual.json").read_text()) == found
    told = succeeds(*first, "-m", "pixels", "--readout", "signed", "--readout", "squared", "--features", "none")
    assert {path: models(out)[path] for path in kept} == kept
    more = json.loads((out / "counterfactual.json").read_text())["4 removed"]
    names = ["D-TRAK", "D-TRAK, squared", "Pixel cosine", "random"]
    assert "no readout of pixels: such scores have no sign, or were read out already; they stand once" in told
    assert list(more) == ["L2", "change of the loss (simple)"] and list(more["L2"]["methods"]) == names
    for name in ("D-TRAK", "random"):
        assert more["L2"]["methods"][name] == figures["L2"]["methods"][name]


def test_das_beside_the_number_before_its_square(out, succeeds, fails, arrays):
    score = ["attribute", "--out", out, "-m", "das", "-m", "pixels", "--no-report", "--num-timesteps", 2, "--proj-dim", 16,
             "--threads", 1, "--device", "cpu"]  # fmt: skip
    command = ["evaluate", "counterfactual", "--out", out, "-m", "das", "--remove", 4, "--queries", 1, "--features", "none",
               *FAST]  # fmt: skip
    succeeds(*score)
    squares = arrays(out / "scores.npz")["scores"]
    why = "no readout of das: such scores have no sign, or were read out already"
    fails(f"{why}: leave --readout away, or give --readout signed as well", *command, "--readout", "squared")
    told = " ".join(succeeds(*command, "--readout", "signed", "--readout", "squared").split())
    assert f"{why}; they stand once, as they are, under signed; `pyattr attribute --readout signed` keeps the" in told
    assert list(json.loads((out / "counterfactual.json").read_text())["4 removed"]["L2"]["methods"]) == [
        "DAS",
        "random",
    ]
    succeeds(*score, "--readout", "signed")
    found = arrays(out / "scores.npz")["scores"]
    assert (found.min() < 0) and np.array_equal(found**2, squares)
    succeeds(*command, *(each for name in ("signed", "squared", "signed-squared") for each in ("--readout", name)))
    figures = json.loads((out / "counterfactual.json").read_text())["4 removed"]["L2"]
    names = ["DAS, signed", "DAS", "DAS, signed squared", "random"]
    assert list(figures["methods"]) == names and "DAS, signed against DAS" in figures["paired by query"]
    (made,) = [one for one in outcomes(out) if one.methods == tuple(names)]
    for method, scores in enumerate((found, squares)):
        assert set(made.removed[method, 0, 0].nonzero()[:, 0].tolist()) == set(np.argsort(-scores[0])[:4].tolist())


def test_one_set_for_all_queries_by_default_a_fifth(out, succeeds):
    told = succeeds(
        "evaluate", "counterfactual", "--out", out, "-m", "pixels", "--together", "--features", "none", *FAST
    )
    assert "done; 2 models trained, each without 4 of 24 images" in told
    (made,) = outcomes(out)
    assert made.images.shape[:3] == (2, 1, 3) and (made.removed == made.removed[:, :, :1]).all()


def test_refusals(out, images, tmp_path, fails, succeeds):
    command = ["evaluate", "counterfactual", "--out", out]
    fails(
        "Invalid value for --readout: must be one of signed, squared, signed-squared, got cubed",
        *command,
        "--readout",
        "cubed",
        code=2,
    )
    fails(
        "Invalid value for --features: must be one of classifier, clip, none, got vgg",
        *command,
        "--features",
        "vgg",
        code=2,
    )
    # A call that scored the missing methods alone would drop the others.
    for missing in (["trak"], ["trak", "das"]):
        named = " ".join(f"--method {name}" for name in ("dtrak", "pixels", *missing))
        fails(
            f"no scores by {', '.join(missing)} in {out}/scores.npz, which has dtrak, pixels: "
            f"run `pyattr attribute --out {out} {named}` first",
            *command, "-m", "pixels", *(each for name in missing for each in ("-m", name)),
        )  # fmt: skip
    fails("--remove must be less than the number of training images, 24, got 24", *command, "-r", 24)
    fails("--queries must be at most the number of generated images, 3, got 4", *command, "--queries", 4)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = ["evaluate", "counterfactual", "--out", empty]
    fails(f"no trained model in {empty}: run `pyattr train SOURCE --out {empty}` first", *other)
    mistyped = tmp_path / "new" / "mistyped"
    line = f"no trained model in {mistyped}: run `pyattr train SOURCE --out {mistyped}` first"
    fails(line, "evaluate", "counterfactual", "--out", mistyped)
    assert not mistyped.parent.exists()
    with np.load(out / "scores.npz") as archive:
        found = dict(archive)
    settings = json.loads(found["settings"].item())
    head = {
        **settings,
        "methods": [{**each, "readout": {"name": "head", "percent": 5}} for each in settings["methods"]],
    }
    np.savez(out / "scores.npz", **{**found, "settings": json.dumps(head)})
    fails(
        f"{out}/scores.npz holds heads of scores, which leave most images at 0 and in no order: run "
        f"`pyattr attribute --out {out}` again, without --readout head",
        *command,
    )
    (out / "scores.npz").write_bytes(b"PK")
    fails(f"{out}/scores.npz is damaged or missing: run `pyattr attribute --out {out}` again", *command)
    np.savez(out / "scores.npz", **found)
    (out / "scores.npz").rename(out / "kept.npz")
    fails(f"no scores in {out}: run `pyattr attribute --out {out}` first", *command)
    succeeds("generate", "--out", out, "-n", 2, "--steps", 2, "--device", "cpu")
    (out / "kept.npz").rename(out / "scores.npz")
    fails(
        f"{out}/scores.npz holds scores of other images: run `pyattr attribute --out {out}` again, "
        "without --queries and --data",
        *command,
    )
    memory = json.loads((out / "run.json").read_text())
    del memory["generate"]
    (out / "run.json").write_text(json.dumps(memory))
    fails(f"no images of this model in {out}: run `pyattr generate --out {out}` first", *command)


def test_images_that_changed_and_images_without_labels_are_refused(images, tmp_path, succeeds, fails, pyattr):
    source, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images / "dark", source)
    steps = ["--steps", 1, "--batch-size", 4, "--threads", 1, "--device", "cpu"]
    succeeds("train", source, "--out", out, *steps)
    succeeds("generate", "--out", out, "-n", 1, "--steps", 1, "--device", "cpu")
    succeeds("attribute", "--out", out, "-m", "pixels", "--no-report", "--threads", 1, "--device", "cpu")
    command = ["evaluate", "counterfactual", "--out", out, "--device", "cpu"]
    result = pyattr(*command, "--features", "classifier")
    assert result.exit_code == 1 and result.stderr.startswith(
        "pyattr: --features classifier needs labels of two classes, and"
    )
    next(source.iterdir()).unlink()
    fails(f"{source} has changed since the model was trained on it: put the images back", *command)
