"""Commands run in this process, and an output folder after all of them, on a toy of 8 x 8 pixels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import SCORE, TRAIN
from typer.testing import CliRunner

from pyattr.cli import app

ENSEMBLE = ["--steps", "2", "--batch-size", "4", "--timesteps", "21", "--threads", "1"]


def _pyattr(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _succeeds(*arguments):
    result = _pyattr(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def _fails(line, *arguments, code=1):
    """The command fails with exactly this line and leaves its output folder as it was."""
    before = _contents(arguments)
    result = _pyattr(*arguments)
    assert (result.exit_code, result.stderr) == (code, f"pyattr: {line}\n")
    assert _contents(arguments) == before


def _contents(arguments):
    """The files and folders in the output folder of a command, and when they were written."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else Path("pyattr-run")
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}


def _arrays(path):
    with np.load(path) as archive:
        return dict(archive)


def _folders(out):
    return {path.name for path in out.iterdir() if path.is_dir()}


def _half_written(out):
    return [path for path in out.rglob("*") if path.name.endswith(".part")]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """24 noisy images in three classes, each with its own bright rows, as an .npz file."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 80, (24, 8, 8), np.uint8), np.arange(24) % 3
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label : 2 * label + 3] += 150
    path = tmp_path_factory.mktemp("stripes") / "x.npz"
    np.savez(path, images=pixels, labels=labels)
    return path


@pytest.fixture(scope="session")
def class_ensemble(stripes, tmp_path_factory):
    """An output folder with a trained ensemble of three members, each of which saw one class."""
    out = tmp_path_factory.mktemp("classes") / "out"
    _succeeds("ensemble", "encode", stripes, "--out", out, "-m", 3, "--codes", "walsh")
    _succeeds("ensemble", "train", "--out", out, *ENSEMBLE)
    return out


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """An output folder after train, generate and attribute."""
    out = tmp_path_factory.mktemp("finished") / "out"
    _succeeds("train", images, "--out", out, *TRAIN)
    _succeeds("generate", "--out", out, "-n", 3, "--steps", 2, "--device", "cpu")
    _succeeds("attribute", "--out", out, "--top", 4, "-m", "dtrak", "-m", "pixels", *SCORE)
    return out


@pytest.fixture(scope="session")
def followed(images, tmp_path_factory):
    """An output folder with three checkpoints of a training, and two images with the way on which they were made."""
    out = tmp_path_factory.mktemp("followed") / "out"
    _succeeds("train", images, "--out", out, *TRAIN, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    _succeeds("generate", "--out", out, "-n", 2, "--steps", 2, "--trajectory", "--device", "cpu")
    return out


@pytest.fixture(scope="module")
def copied(followed, tmp_path_factory):
    """An output folder with checkpoints, where features stay from test to test."""
    out = tmp_path_factory.mktemp("copied") / "out"
    shutil.copytree(followed, out)
    return out


@pytest.fixture(scope="session")
def train(images):
    """The training images in the order of the command line, [N, 1, 8, 8] uint8."""
    files = sorted((images / "dark").iterdir()) + sorted((images / "light").iterdir())
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])[:, None])


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="session")
def pyattr():
    return _pyattr


@pytest.fixture(scope="session")
def succeeds():
    return _succeeds


@pytest.fixture(scope="session")
def fails():
    return _fails


@pytest.fixture(scope="session")
def arrays():
    return _arrays


@pytest.fixture(scope="session")
def folders():
    return _folders


@pytest.fixture(scope="session")
def half_written():
    return _half_written
