"""`pyattr ensemble`: what comes out, what is found again, what is refused, on a toy of 8 x 8 pixels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyattr.attribution import EncodedEnsemble, codes
from pyattr.cli import run
from pyattr.cli.workspace import Workspace, WorkspaceError
from pyattr.diffusion import Schedule
from pyattr.diffusion.storage import load_tensors

TRAIN = ["--steps", 2, "--batch-size", 4, "--timesteps", 21, "--threads", 1]
SAMPLE = ["-n", 3, "--steps", 3, "--threads", 1]
SCHEDULE = Schedule(21, 0.1 / 21, 20 / 21)


def ensemble(command, *arguments):
    return ["ensemble", command, *arguments]


@pytest.fixture(scope="module")
def made(images, tmp_path_factory, succeeds):
    """An output folder after encode, train, sample, ablate and search."""
    out = tmp_path_factory.mktemp("ensemble") / "out"
    told = succeeds(*ensemble("encode", images, "--out", out, "-m", 7))
    assert "done; 24 codes, members see" in told
    succeeds(*ensemble("train", "--out", out, *TRAIN))
    succeeds(*ensemble("sample", "--out", out, *SAMPLE))
    succeeds(*ensemble("ablate", "--out", out, "-i", "dark/00.png", "-i", "light/03.png", "--threads", 1))
    succeeds(*ensemble("search", "--out", out, "--top", 4, "--threads", 1))
    return out


@pytest.fixture
def again(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def library(images):
    """The same by the library."""
    torch.set_num_threads(1)
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    train = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    model = EncodedEnsemble(
        "mnist-small", codes.random_codes(24, 7), num_members=7, schedule=SCHEDULE, steps=2, batch_size=4
    ).fit(train)
    return model, model.sample(3, steps=3)


def test_the_results_are_those_of_the_library(made, library, arrays):
    model, samples = library
    ablation, scores = arrays(made / "ensemble-ablation.npz"), arrays(made / "ensemble-scores.npz")
    np.testing.assert_array_equal(ablation["samples"], samples.uint8().numpy())
    np.testing.assert_array_equal(scores["queries"], samples.uint8().numpy())
    places = [list(scores["ids"]).index(name) for name in ablation["names"]]
    assert list(ablation["names"]) == ["dark/00.png", "light/03.png"]
    exact = model.counterfactual(samples, model.codes[places])
    np.testing.assert_allclose(ablation["counterfactuals"], (exact.numpy() + 1) * 127.5, atol=0.51)
    changes = (exact - samples.images[:, None]).flatten(2).norm(dim=2) / 2
    np.testing.assert_allclose(ablation["changes"], changes.numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores["scores"], model.scores(samples).numpy(), rtol=1e-3, atol=1e-6)
    assert scores["top"].shape == (3, 4) and scores["gram"].shape == (3, 7, 7)
    guesses = model.approximate(samples, model.codes[scores["top"][:, 0]])[range(3), range(3)]
    np.testing.assert_allclose(scores["without_top"], (guesses.clamp(-1, 1).numpy() + 1) * 127.5, atol=0.55)
    for row, top in zip(scores["scores"], scores["top"], strict=True):
        np.testing.assert_allclose(row[top], np.sort(row)[::-1][:4], rtol=1e-5)


def test_pictures(made):
    assert len(list(made.glob("ensemble-samples-*/image-*.png"))) == 3
    for name in ("samples", "ablation", "search"):
        with Image.open(made / f"ensemble-{name}.png") as picture:
            assert min(picture.size) > 50


def test_what_is_finished_is_found(made, succeeds, folders):
    before = {path: path.stat().st_mtime_ns for path in made.glob("*-*/*") if path.is_file()}
    names = folders(made)
    for command in (
        ensemble("train", "--out", made, *TRAIN),
        ensemble("sample", "--out", made, *SAMPLE),
        ensemble("ablate", "--out", made, "-i", "dark/00.png", "-i", "light/03.png", "--threads", 1),
        ensemble("search", "--out", made, "--top", 4, "--threads", 1),
    ):
        assert "found" in succeeds(*command)
    assert folders(made) == names
    assert {path: path.stat().st_mtime_ns for path in made.glob("*-*/*") if path.is_file()} == before


def test_a_picture_has_no_more_columns_than_a_page(again, made, succeeds, arrays):
    succeeds(*ensemble("search", "--out", again, "--top", 24, "--threads", 1))
    assert arrays(again / "ensemble-scores.npz")["top"].shape == (3, 24)
    with Image.open(made / "ensemble-search.png") as four, Image.open(again / "ensemble-search.png") as twenty:
        assert twenty.width / four.width == pytest.approx((3 + 20) / (3 + 4), rel=0.1)


def test_distinct_lists_do_not_overlap(again, succeeds, arrays):
    succeeds(*ensemble("search", "--out", again, "--top", 2, "--distinct", "--threads", 1))
    top = arrays(again / "ensemble-scores.npz")["top"]
    assert top.shape == (3, 2) and len(np.unique(top)) == 6


def test_classes_are_ablated_together(images, tmp_path, succeeds, arrays, fails):
    out = tmp_path / "out"
    succeeds(*ensemble("encode", images, "--out", out, "-m", 2, "--codes", "classes"))
    kept = arrays(next(out.glob("ensemble-codes-*")) / "codes.npz")["codes"]
    assert sorted(kept[[0, 12]]) == [1, 2] and set(kept[:12]) == {kept[0]} and set(kept[12:]) == {kept[12]}
    succeeds(*ensemble("train", "--out", out, *TRAIN))
    succeeds(*ensemble("sample", "--out", out, *SAMPLE))
    succeeds(*ensemble("ablate", "--out", out, "--threads", 1))
    every = arrays(out / "ensemble-ablation.npz")
    assert list(every["names"]) == ["dark", "light"]
    succeeds(*ensemble("ablate", "--out", out, "-l", "light", "-i", "light/05.png", "--threads", 1))
    some = arrays(out / "ensemble-ablation.npz")
    assert list(some["names"]) == ["light", "light/05.png"]
    # An image shares the code of its class.
    np.testing.assert_array_equal(some["counterfactuals"][:, 1], some["counterfactuals"][:, 0])
    np.testing.assert_allclose(some["changes"][:, 0], every["changes"][:, 1], rtol=1e-5)
    fails("data: no class is named grey: there are dark, light", *ensemble("ablate", "--out", out, "-l", "grey"))
    # Other codes make the rest outdated.
    succeeds(*ensemble("encode", images, "--out", out, "-m", 2, "--codes", "classes", "--seed", 1))
    fails(f"the ensemble in {out} was trained on other codes: run `pyattr ensemble train --out {out}` first",
          *ensemble("sample", "--out", out, *SAMPLE))  # fmt: skip


def test_walsh_codes(tmp_path, succeeds, arrays):
    labels = np.array([3, 1, 2, 2, 1])
    np.savez(tmp_path / "x.npz", images=np.zeros((5, 8, 8), np.uint8), labels=labels)
    told = succeeds(*ensemble("encode", tmp_path / "x.npz", "--out", tmp_path, "-m", 3, "--codes", "walsh"))
    kept = arrays(next(tmp_path.glob("ensemble-codes-*")) / "codes.npz")
    np.testing.assert_array_equal(kept["codes"], codes.walsh_codes(labels, 3))
    assert "done; 3 codes, members see 1 to 2 of 5 images" in told


def test_labels_that_changed_are_other_codes(tmp_path, succeeds, fails, folders):
    pixels, path, out = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8), tmp_path / "x.npz", tmp_path / "out"
    encode = ensemble("encode", path, "--out", out, "-m", 3, "--codes", "walsh")
    np.savez(path, images=pixels, labels=[3, 1, 2, 2, 1])
    succeeds(*encode)
    np.savez(path, images=pixels, labels=[1, 3, 2, 2, 1])
    fails(f"{path} has changed since its images were encoded: put them back, or encode again",
          *ensemble("train", "--out", out, *TRAIN))  # fmt: skip
    succeeds(*encode)
    assert len(folders(out)) == 2


def test_classes_that_a_part_of_the_images_lacks(tmp_path, succeeds, arrays, fails):
    for number, name in enumerate(["a/0", "a/1", "a/2", "b/3", "c/4", "c/5"]):
        (tmp_path / "images" / name[0]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * number).save(tmp_path / f"images/{name}.png")
    out = tmp_path / "out"
    # Of six images every other one is kept: none of b.
    succeeds(*ensemble("encode", tmp_path / "images", "--limit", 3, "--out", out, "-m", 2, "--codes", "classes"))
    succeeds(*ensemble("train", "--out", out, *TRAIN))
    succeeds(*ensemble("sample", "--out", out, *SAMPLE))
    fails("data: no class is named b: there are a, c", *ensemble("ablate", "--out", out, "-l", "b"))
    succeeds(*ensemble("ablate", "--out", out, "--threads", 1))
    assert list(arrays(out / "ensemble-ablation.npz")["names"]) == ["a", "c"]


def test_refusals_of_codes(images, tmp_path, fails, pyattr):
    out = tmp_path / "out"
    np.savez(tmp_path / "plain.npz", images=np.zeros((24, 8, 8), np.uint8))
    told = (
        f"data: --codes walsh needs labels, and {tmp_path}/plain.npz has none: put the images of each class into a folder of "
        "its own, or take --codes items"
    )
    fails(told, *ensemble("encode", tmp_path / "plain.npz", "--out", out, "--codes", "walsh"))
    fails("4 members have 6 codes of 2 ones, fewer than the 24 images: give more --num-members, or another --weight",
          *ensemble("encode", images, "--out", out, "-m", 4))  # fmt: skip
    fails("random_codes: weight must lie in [1, 3], got 4",
          *ensemble("encode", images, "--out", out, "-m", 4, "--weight", 4))  # fmt: skip
    np.savez(tmp_path / "many.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    fails("4 members have 4 codes of 1 ones, fewer than the 5 classes: give more --num-members, or another --weight",
          *ensemble("encode", tmp_path / "many.npz", "--out", out, "-m", 4, "--codes", "classes", "--weight", 1))  # fmt: skip
    fails("--weight goes with random codes: leave it out, or take --codes classes",
          *ensemble("encode", images, "--out", out, "-m", 3, "--codes", "walsh", "--weight", 1))  # fmt: skip
    fails("walsh_codes: num_members + 1 must be a power of two, got num_members 4",
          *ensemble("encode", images, "--out", out, "-m", 4, "--codes", "walsh"))  # fmt: skip
    seen = codes.membership(codes.group_codes(np.repeat([0, 1], 12), 8, weight=1), 8).any(0)
    fails(f"member {seen.argmin()} would see no image at all: give fewer --num-members, or more images",
          *ensemble("encode", images, "--out", out, "-m", 8, "--codes", "classes", "--weight", 1))  # fmt: skip
    found = pyattr(*ensemble("encode", images, "--out", out, "--codes", "some"))
    assert found.exit_code == 2 and "must be one of items, classes, walsh, got some" in found.stderr
    assert not [path for path in out.iterdir() if path.name != ".lock"]


def test_each_command_says_which_comes_first(images, tmp_path, succeeds, fails):
    out = tmp_path / "out"

    def lacks(what, first, command, *arguments):
        fails(f"no {what} in {out}: run `pyattr ensemble {first} --out {out}` first",
              *ensemble(command, "--out", out, *arguments))  # fmt: skip

    lacks("codes", "encode SOURCE", "train")
    lacks("codes", "encode SOURCE", "sample")
    succeeds(*ensemble("encode", images, "--out", out, "-m", 7))
    lacks("trained ensemble", "train", "sample")
    lacks("trained ensemble", "train", "search")
    fails("train: learning_rate must be positive, got 0.0", *ensemble("train", "--out", out, "--learning-rate", 0))
    fails("unet: name must be one of cifar, celeba, mnist-small, got 'big'",
          *ensemble("train", "--out", out, "--network", "big"))  # fmt: skip


def test_refusals_of_a_made_ensemble(again, made, images, fails, succeeds, tmp_path):
    def refuses(told, command, *arguments):
        fails(told, *ensemble(command, "--out", again, *arguments))

    told = "every member saw some images of each class: give --item NAME, or encode again with --codes classes or walsh"
    refuses(told, "ablate")
    refuses(told, "ablate", "-l", "dark")
    refuses("data: no training image is named 7: names look like dark/00.png", "ablate", "-i", "7")
    refuses("--top must be at most the number of training images, 24, got 25", "search", "--top", 25)
    refuses("sample: method must be one of ddim, ddpm, published, got 'euler'", "sample", "--method", "euler")
    # Three lists of 24 images cannot be of nine each without repeats.
    told = "too few images are left for lists of 9 without repeats: give a smaller --top, or leave out --distinct"
    refuses(told, "search", "--distinct", "--top", 9)
    # Another ensemble in the same folder, whose samples are still to be made.
    succeeds(*ensemble("train", "--out", again, *TRAIN, "--seed", 1))
    refuses(
        f"the images in {again} are of another ensemble: run `pyattr ensemble sample --out {again}` first", "search"
    )
    # Images that changed.
    record = json.loads((again / "run.json").read_text())
    shutil.copytree(images, tmp_path / "images")
    Image.new("L", (8, 8)).save(tmp_path / "images/dark/00.png")
    record["ensemble codes"]["data"]["source"] = str(tmp_path / "images")
    (again / "run.json").write_text(json.dumps(record))
    told = f"{tmp_path}/images has changed since its images were encoded: put them back, or encode again"
    refuses(told, "train", *TRAIN)


def test_killed_in_the_middle_it_ends_at_the_same_bits(images, made, tmp_path, succeeds, half_written):
    out = tmp_path / "out"
    succeeds(*ensemble("encode", images, "--out", out, "-m", 7))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    train = [str(each) for each in ensemble("train", "--out", out, *TRAIN)]
    process = subprocess.Popen([sys.executable, "-m", "pyattr", *train], env=environment, stdout=subprocess.DEVNULL)
    while not any(out.glob("ensemble-*/member-02/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob("ensemble-*/member-0[01]/checkpoint-*")}
    assert len(done) >= 2
    assert "partly done" in succeeds(*train)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    ours, theirs = (sorted(folder.glob("ensemble-*/member-*/checkpoint-00000002*")) for folder in (out, made))
    assert len(ours) == len(theirs) == 7
    for a, b in zip(ours, theirs, strict=True):
        assert re.sub(r".*/member", "member", str(a)) == re.sub(r".*/member", "member", str(b))
        (tensors, record), (wanted, wanted_record) = load_tensors(a), load_tensors(b)
        assert record == wanted_record and tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert not [path for path in half_written(out) if "member-02" not in str(path)]


def test_the_device_reaches_every_member(again, monkeypatch, succeeds):
    """No other device is there to be moved to, so what is asked of the modules is noted."""
    asked, move, device = [], torch.nn.Module.to, torch.device("cuda:1")
    monkeypatch.setattr(run, "device_of", lambda name: {"cuda:1": device}[name])
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where: (asked.append(where), move(self, "cpu"))[1])
    for command in (
        ensemble("train", *TRAIN, "--seed", 1),
        ensemble("sample", "-n", 1, "--steps", 1, "--threads", 1),
        ensemble("ablate", "-i", "dark/00.png", "--threads", 1),
        ensemble("search", "--top", 1, "--threads", 1),
        ensemble("evaluate", "--no-guesses", "--threads", 1),
    ):
        if command[1] == "evaluate":
            succeeds(*ensemble("sample", "-n", 2, "--steps", 1, "--threads", 1), "--out", again, "--device", "cuda:1")
        asked.clear()
        succeeds(*command, "--out", again, "--device", "cuda:1")
        # Training builds the first member once more, to see that it can.
        assert set(asked) == {(device,)} and len(asked) == (8 if command[1] == "train" else 7)


def test_a_device_that_is_missing(again, fails):
    there = torch.cuda.device_count()
    for command in ("train", "sample", "ablate", "search", "evaluate"):
        fails(f"--device cuda:99: torch sees {there} GPUs: use --device cpu",
              *ensemble(command, "--out", again, "--device", "cuda:99"))  # fmt: skip


def test_room_for_the_images_that_several_processes_share(again, images, monkeypatch, pyattr):
    sizes = []

    def full(self, size, purpose):
        sizes.append(size)
        raise WorkspaceError("full")

    monkeypatch.setattr(Workspace, "need_space", full)
    for workers in (1, 2):
        train = ensemble("train", "--out", again, *TRAIN, "--seed", 1, "--workers", workers)
        assert pyattr(*train).stderr == "pyattr: full\n"
    # What is being written of one more member, and the images' bytes.
    assert sizes[1] - sizes[0] == 2 * 3 * 4 * 427_204 + 24 * 8 * 8
