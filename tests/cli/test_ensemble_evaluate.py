"""`pyattr ensemble evaluate`: its numbers, what is found again, what is refused, on a toy of 8 x 8 pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.attribution.codes import walsh_codes
from pyattr.cli import ensemble_evaluate
from pyattr.evaluation import Classifier, Distances, Extractor, fid

EVALUATE = ["--epochs", 4, "--threads", 1]
LABELS = np.arange(24) % 3


@pytest.fixture(scope="module")
def sampled(class_ensemble, tmp_path_factory, succeeds):
    """Samples of an ensemble with codes of classes."""
    out = tmp_path_factory.mktemp("sampled") / "out"
    shutil.copytree(class_ensemble, out)
    succeeds("ensemble", "sample", "--out", out, "-n", 4, "--steps", 3, "--threads", 1)
    return out


@pytest.fixture(scope="module")
def by_class(sampled, tmp_path_factory, succeeds):
    """The same, evaluated, and what was said."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    shutil.copytree(sampled, out)
    return out, succeeds("ensemble", "evaluate", "--out", out, *EVALUATE)


@pytest.fixture(scope="module")
def few(stripes, tmp_path_factory, arrays):
    """Six of the images, two of each class."""
    path = tmp_path_factory.mktemp("few") / "x.npz"
    np.savez(path, **{name: array[:6] for name, array in arrays(stripes).items()})
    return path


@pytest.fixture(scope="module")
def by_item(few, tmp_path_factory, succeeds):
    """Samples of an ensemble with codes of items."""
    out = tmp_path_factory.mktemp("items") / "out"
    succeeds("ensemble", "encode", few, "--out", out, "-m", 4)
    succeeds("ensemble", "train", "--out", out, "--steps", 1, "--batch-size", 2, "--timesteps", 21, "--threads", 1)
    succeeds("ensemble", "sample", "--out", out, "-n", 2, "--steps", 2, "--threads", 1)
    return out


def results(out):
    return json.loads((out / "ensemble-evaluation.json").read_text())


def test_the_numbers_are_those_of_the_library(by_class, stripes, arrays):
    out, told = by_class
    found = results(out)
    folder = next(path.parent for path in out.glob("ensemble-*/ensemble.safetensors"))
    model, images = EncodedEnsemble.open(folder), arrays(stripes)["images"][:, None]
    torch.set_num_threads(1)
    samples = model.sample(4, steps=3)
    codes = walsh_codes(LABELS, 3)[:3]  # of the classes 0, 1, 2
    exact = model.counterfactual(samples, codes)  # [4, 3, 1, 8, 8]
    judge = Classifier(epochs=4).fit(images, LABELS)

    assert found["settings"]["members"] == 3 and found["settings"]["codes"] == "walsh"
    assert found["settings"]["samples"]["steps"] == 3 and found["settings"]["images"] == 24
    assert found["classifier"]["accuracy on them"] == pytest.approx((judge.predict(images) == LABELS).mean(), rel=1e-4)
    assert "members saw" in found["classifier"]["trained on"]
    ablation = found["class ablation"]
    classes = judge.predict(samples.images)
    after = np.stack([judge.predict(each) for each in exact])  # [4, 3]
    assert ablation["samples by predicted class"] == np.bincount(classes, minlength=3).tolist()
    own = after[range(4), classes] != classes
    assert ablation["own ablation flips the class"]["percent"] == pytest.approx(100 * own.mean(), rel=1e-4)
    distances = ((exact - samples.images[:, None]) / 2).flatten(2).norm(dim=2).numpy()
    assert ablation["by distance"].keys() == {"L2", "classifier-feature distance"}
    recovered = ablation["by distance"]["L2"]["most influential ablation is of the sample's class"]
    assert recovered["percent"] == pytest.approx(100 * (distances.argmax(1) == classes).mean(), rel=1e-4)
    median = ablation["by distance"]["L2"]["median of own ablation"]
    assert median == pytest.approx(np.median(distances[range(4), classes]), rel=1e-3)
    quality = found["Fréchet distance of classifier features"]
    assert quality["ensemble"] == pytest.approx(fid(samples.images, images, judge.extractor).value, rel=1e-3)
    member = model.counterfactual(samples, [0b101])[:, 0]  # the second alone
    assert quality["members"][1] == pytest.approx(fid(member, images, judge.extractor).value, rel=1e-3)

    assert found["ablated"] == ["0", "1", "2"]
    guess = model.approximate(samples, codes)
    change, guessed = ((x - samples.images[:, None]).flatten(2).double().numpy() for x in (exact, guess))
    pearson = [np.corrcoef(change[q, m], guessed[q, m])[0, 1] for q in range(4) for m in range(3)]
    assert found["agreement"]["Jacobian"]["median Pearson"] == pytest.approx(np.median(pearson), rel=1e-3)
    assert found["Jacobian against"].keys() == {"last step predicted noise", "individual models"}
    settling = found["convergence, mean L2"]
    assert settling["members"] == [1, 2, 3] and settling["to the full ensemble"][2] == 0
    assert "own class most influential, by L2" in told and "mean L2 between 1 and all 3 members" in told


def test_pictures(by_class):
    out, told = by_class
    for name in ("classes", "plane", "guesses"):
        path = out / f"ensemble-evaluation-{name}.png"
        assert f"picture  {path}" in told
        with Image.open(path) as picture:
            assert min(picture.size) > 50


def test_what_is_finished_is_found(by_class, succeeds, folders):
    out, _ = by_class
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*/*") if path.is_file()}
    names, found = folders(out), (out / "ensemble-evaluation.json").read_bytes()
    told = succeeds("ensemble", "evaluate", "--out", out, *EVALUATE)
    assert told.count("  found") == 6 and "to do" not in told
    # What other commands make is the same.
    assert "  found" in succeeds("ensemble", "ablate", "--out", out, "--threads", 1)
    assert "  found" in succeeds("ensemble", "search", "--out", out, "--top", 2, "--threads", 1)
    assert folders(out) == names and (out / "ensemble-evaluation.json").read_bytes() == found
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-*/*") if path.is_file()} == before


def test_codes_of_items(by_item, tmp_path, succeeds):
    out = tmp_path / "out"
    shutil.copytree(by_item, out)
    evaluate = ["ensemble", "evaluate", "--out", out, "--items", 3, *EVALUATE]
    succeeds(*evaluate)
    found = results(out)
    assert "class ablation" not in found and len(found["Fréchet distance of classifier features"]["members"]) == 4
    names = found["ablated"]
    assert len(set(names)) == 3 and found["agreement"].keys() >= {"Jacobian"}
    assert not (out / "ensemble-evaluation-classes.png").exists()
    # Another seed: other items, and members in another order.
    succeeds(*evaluate, "--seed", 1)
    assert results(out)["ablated"] != names
    assert results(out)["convergence, mean L2"] != found["convergence, mean L2"]
    # Without guesses nothing is left that asks for items.
    succeeds(*evaluate, "--no-guesses")
    assert results(out).keys() == found.keys() - {
        "ablated", "agreement", "Jacobian against", "Jacobian against, paired by sample", "size of the true changes, L2"
    }  # fmt: skip
    assert (out / "ensemble-evaluation-settling.png").exists()


def test_images_without_labels(by_item, few, tmp_path, succeeds, arrays):
    out, path = tmp_path / "out", tmp_path / "x.npz"
    shutil.copytree(by_item, out)
    np.savez(path, images=arrays(few)["images"])
    memory = out / "run.json"
    memory.write_text(memory.read_text().replace(str(few), str(path)))
    told = succeeds("ensemble", "evaluate", "--out", out, "--no-guesses", *EVALUATE)
    assert results(out).keys() == {"settings", "convergence, mean L2"}
    assert "1/1  Settling" in told


def test_standard_networks_keep_their_names_and_their_work(sampled, tmp_path, monkeypatch, succeeds):
    out, asked = tmp_path / "out", {"features": 0, "pairs": 0}
    shutil.copytree(sampled, out)

    class Net(nn.Module):
        def forward(self, images):
            asked["features"] += len(images)
            return images.flatten(1)[:, :4]

    def pairs(first, second):
        asked["pairs"] += len(first)
        return Distances("LPIPS", np.arange(len(first), dtype=np.float64))

    monkeypatch.setattr(ensemble_evaluate, "inception", lambda: Extractor("Inception-v3", Net(), standard=True))
    monkeypatch.setattr(ensemble_evaluate, "lpips", pairs)
    evaluate = ["ensemble", "evaluate", "--out", out, "--extractor", "standard", "--no-guesses", *EVALUATE]
    told = succeeds(*evaluate)
    assert "40 images by Inception-v3, LPIPS of 12 pairs" in " ".join(told.split())
    found = results(out)
    assert found["class ablation"]["by distance"].keys() == {"L2", "LPIPS"}
    # Each of 24 images, of 4 samples and of 3 members' once; the 12 pairs after one to try.
    assert len(found["FID"]["members"]) == 3 and asked == {"features": 24 + 4 + 12, "pairs": 12 + 1}
    succeeds(*evaluate)
    assert results(out) == found and asked == {"features": 40, "pairs": 12 + 2}


def test_standard_networks_that_are_missing_are_told_of_first(sampled, tmp_path, monkeypatch, fails):
    def missing():
        raise ImportError("inception needs the package torchvision: install pyattr[evaluation]")

    shutil.copytree(sampled, tmp_path / "out")
    monkeypatch.setattr(ensemble_evaluate, "inception", missing)
    fails("inception needs the package torchvision: install pyattr[evaluation]",
          "ensemble", "evaluate", "--out", tmp_path / "out", "--extractor", "standard")  # fmt: skip


def test_refusals(by_item, few, tmp_path, succeeds, fails):
    out = tmp_path / "out"
    shutil.copytree(by_item, out)
    evaluate = ["ensemble", "evaluate", "--out"]
    fails("Invalid value for --extractor: must be one of classifier, standard, got vgg",
          *evaluate, out, "--extractor", "vgg", code=2)  # fmt: skip
    fails("--items must be at most the number of training images, 6, got 7", *evaluate, out, "--items", 7)
    succeeds("ensemble", "sample", "--out", out, "-n", 1, "--steps", 1, "--threads", 1)
    fails(f"one image is too few to evaluate: run `pyattr ensemble sample --num-images 2 --out {out}` first",
          *evaluate, out)  # fmt: skip
    # Codes of other images than those of the samples.
    succeeds("ensemble", "encode", few, "--out", out, "-m", 4, "--seed", 1)
    fails(f"the ensemble in {out} was trained on other codes: run `pyattr ensemble train --out {out}` first",
          *evaluate, out)  # fmt: skip
