"""What the commands refuse, what they say then, and what a full disk does."""

import errno
import json
import os
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import SCORE, TRAIN

from pyattr import attribution, diffusion
from pyattr.cli.options import DataOptions, SampleOptions, TrainOptions
from pyattr.cli.stages import Sampling, Training, load_data
from pyattr.cli.workspace import Workspace
from pyattr.datasets import load
from pyattr.diffusion.train import WEIGHTINGS

# Bad input


def test_bad_data(tmp_path, pyattr, fails, folders):
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


def test_images_that_do_not_fit_the_network(tmp_path, fails):
    np.savez(tmp_path / "wide.npz", images=np.zeros((4, 8, 12), np.uint8))
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 10, 10), np.uint8))
    for name, size in (("wide", "8x12"), ("odd", "10x10")):
        fails("the network mnist-small needs square images whose side is a multiple of 4, "
              f"got {size}: give --size 8", "train", "--data", tmp_path / f"{name}.npz", "--out", tmp_path / "out")  # fmt: skip
    fails("unet: name must be one of cifar, celeba, mnist-small, got 'big'",
          "train", "--data", tmp_path / "odd.npz", "--network", "big", "--out", tmp_path / "out")  # fmt: skip


def test_what_is_missing_is_said_with_what_to_do(tmp_path, images, finished, fails):
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
    fails("data: queries are 3×8×8 and training images 1×8×8: give queries of the same size and channels",
          "attribute", "--out", out, "--checkpoint", checkpoint, "--data", images,
          "--queries", tmp_path / "colour.npz")  # fmt: skip


def test_images_that_the_model_was_not_trained_on(out, images, tmp_path, succeeds, fails):
    """Those of the last training are the default, as long as they are what they were."""
    source = tmp_path / "copy"
    shutil.copytree(images, source)
    succeeds("train", source, "--out", out, *TRAIN)  # the same pixels: found
    checkpoint = max(next(out.glob("train-*")).glob("checkpoint-*"))
    attribute = ["attribute", "--out", out, "-m", "pixels", "--device", "cpu"]
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


def test_queries_of_another_size_are_never_resized_unasked(out, images, tmp_path, succeeds, fails, arrays):
    np.savez(tmp_path / "large.npz", images=np.arange(2 * 16 * 16).reshape(2, 16, 16).astype(np.uint8))
    np.savez(tmp_path / "wide.npz", images=np.zeros((3, 8, 12), np.uint8))
    shapes = "data: queries are 1×16×16 and training images 1×8×8: "
    told = shapes + "give --size 8, or queries of the same size and channels"
    queries = ["--queries", tmp_path / "large.npz", "-m", "nda", "--patch-timesteps", 1, "--device", "cpu"]
    fails(told, "attribute", "--out", out, *queries)  # with a model, and the images that it was trained on
    fails(told, "attribute", "--out", out, "--data", images, *queries)
    new = ["attribute", "--out", tmp_path / "new", "--data", images, *queries]  # without a model
    fails(told, *new)
    fails("data: queries are 1×16×16 and training images 1×8×12: give queries of the same size and channels",
          "attribute", "--out", tmp_path / "new", "--data", tmp_path / "wide.npz", *queries)  # fmt: skip
    expected = load(tmp_path / "large.npz", size=8).images
    for arguments in (["attribute", "--out", out, *queries], new):
        succeeds(*arguments, "--size", 8)
        np.testing.assert_array_equal(arrays(arguments[2] / "scores.npz")["queries"], expected)


def test_queries_are_read_as_the_remembered_training_images_were(images, tmp_path, succeeds, arrays):
    """`train --size` says how; `attribute` without --data keeps to it."""
    np.savez(tmp_path / "large.npz", images=np.arange(6 * 16 * 16).reshape(6, 16, 16).astype(np.uint8))
    out, large = tmp_path / "out", tmp_path / "large.npz"
    succeeds("train", large, "--size", 8, "--out", out, *TRAIN)
    succeeds("attribute", "--out", out, "--queries", large, "-m", "pixels", "--device", "cpu")
    np.testing.assert_array_equal(arrays(out / "scores.npz")["queries"], load(large, size=8).images)


def test_images_that_the_model_cannot_take(out, tmp_path, fails):
    for shape, given, hint in (
        ((3, 32, 32), "1×32×32", "give --size 8, or the images that it was trained on"),
        ((3, 8, 8, 3), "3×8×8", "give the images that it was trained on"),
    ):
        np.savez(tmp_path / "x.npz", images=np.zeros(shape, np.uint8))
        fails(f"data: the images are {given} and those of the model 1×8×8: {hint}",
              "attribute", "--out", out, "--data", tmp_path / "x.npz", *SCORE)  # fmt: skip


def test_a_model_is_used_with_the_schedule_it_was_trained_with(images, tmp_path, succeeds, fails, arrays):
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


def test_damaged_files_are_named(out, pyattr, fails):
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


def test_nobody_is_told_to_delete_the_checkpoint_they_named(out, images, tmp_path, fails):
    command = ["generate", "--out", out, "--checkpoint"]
    wanted = "--checkpoint must be a file or folder that `pyattr train` wrote, got"
    np.savez(tmp_path / "d.npz", x=np.zeros(2))
    fails(f"{wanted} {tmp_path}/d.npz, which is an .npz archive", *command, tmp_path / "d.npz")
    checkpoint = max(next(out.glob("train-*")).glob("checkpoint-*"))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoint.read_bytes()[:-1] + b"x")
    fails(f"{wanted} {copy}, which is damaged (its checksum does not match)", *command, copy)


def test_damaged_scores_are_named(out, fails):
    path = next(out.glob("dtrak-scores-*")) / "scores.npz"
    path.write_bytes(path.read_bytes()[:-30])
    fails(f"{path} is damaged or missing: delete the folder {path.parent} and run again",
          "attribute", "--out", out, "--top", 4, *SCORE)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["attribute", "--method", "guess"],
            "Invalid value for --method: must be one of dtrak, das, probed-das, trak, journey-trak, relative-influence, "
            "renormalized-influence, gradient-dot, gradient-cosine, tracincp, gas, nda, pixels, clip-similarity, "
            "empirical-influence, datamodel, magic, got guess",
        ),
        (
            ["attribute", "--limit", "3"],
            "Invalid value for --data: --size and --limit say how to read it: give it as well",
        ),
        (["train"], "Invalid value for SOURCE: give the training images once"),
        (["train", "a", "--data", "b"], "Invalid value for SOURCE: give the training images once"),
    ],
)
def test_wrong_use(arguments, line, fails):
    fails(line, *arguments, code=2)


def test_options_that_are_not_possible_leave_nothing_behind(images, out, tmp_path, fails):
    train = ["train", images, "--out", tmp_path / "new", "--device", "cpu"]
    fails("train: learning_rate must be positive, got -1.0", *train, "--learning-rate", -1)
    fails("train: ema must lie in (0, 1), got 1.0", *train, "--ema", 1)
    fails("train: weighting must be one of " + ", ".join(WEIGHTINGS) + ", got 'heavy'", *train, "--weighting", "heavy")
    generate = ["generate", "--out", out, "--device", "cpu"]
    fails("sample: method must be one of ddim, ddpm, published, got 'foo'", *generate, "--method", "foo")
    fails("sample: steps must lie in [1, 1000], got 2000", *generate, "--steps", 2000)
    fails(
        "sample: eta must lie in [0, 1], and be 0 for ddpm and published, got 0.5",
        *generate,
        "--method",
        "ddpm",
        "--eta",
        0.5,
    )
    # Nor are the scores made of the method before the one that cannot be.
    attribute = ["attribute", "--out", out, "--queries", images / "dark", "-m", "pixels", "-m", "dtrak", *SCORE]
    fails(
        "FeatureMap: strategy must be one of uniform, cumulative, midpoint, got 'foo'", *attribute, "--strategy", "foo"
    )
    fails("FeatureMap: num_timesteps must lie in [1, 1000], got 2000", *attribute, "--num-timesteps", 2000)
    kinds = "FeatureMap: kind must be one of rademacher, gaussian, sparse, multisketch, got 'foo'"
    fails(kinds, *attribute, "--projection", "foo")
    for number in ("-1.0", "0.0", "inf", "nan", "1,", "1,0", "one"):
        told = f"must be positive and finite, a number or several with commas between, got {number}"
        fails(f"Invalid value for --lambda: {told}", *attribute, "--lambda", number, code=2)
    nda = ["attribute", "--out", out, "--queries", images / "dark", "-m", "nda", "--patch-timesteps", 501]
    fails("attribute: patch_timesteps must lie in [1, 500], got 501", *nda)


def test_devices(images, tmp_path, fails):
    fails("--device must be auto, cpu, cuda or cuda:NUMBER, got abacus",
          "train", "--data", images, "--out", tmp_path / "out", "--device", "abacus")  # fmt: skip
    if not torch.cuda.is_available():
        fails("--device cuda: torch sees 0 GPUs: use --device cpu",
              "train", "--data", images, "--out", tmp_path / "out", "--device", "cuda")  # fmt: skip


# A full disk


def test_a_disk_without_room_is_refused_at_the_start(images, tmp_path, monkeypatch, pyattr, folders):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, 10**6))
    result = pyattr("train", "--data", images, "--out", tmp_path / "out", *TRAIN)
    assert result.exit_code == 1
    assert re.fullmatch(rf"pyattr: the disk of {tmp_path}/out is too full: what is to be done takes about \d+ MB, 1 MB are "
                        "free: free some space, or choose another folder with --out\n", result.stderr)  # fmt: skip
    assert folders(tmp_path / "out") == set()


def test_room_for_every_slice_of_noise(tmp_path):
    def size(**options):
        with Workspace(tmp_path) as workspace:
            return Sampling(workspace, "model", (1, 8, 8), SampleOptions(num_images=2, steps=50, **options)).size

    noisy = 2 * 4 * 2 * 64 * (1 + 50)
    assert size(method="published") == size(method="ddpm") == size(method="ddim", eta=0.5) == noisy
    assert size(method="ddim") == 2 * 4 * 2 * 64 * 2


def test_room_that_the_interrupted_run_has_taken_is_not_asked_for_again(
    images, tmp_path, monkeypatch, pyattr, succeeds
):
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


def test_a_disk_that_fills_at_any_write_loses_nothing(
    finished, images, tmp_path, monkeypatch, pyattr, succeeds, arrays, folders, half_written
):
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
