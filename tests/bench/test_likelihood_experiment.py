"""The experiment with the likelihood from end to end, on noise and a small network."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench.experiments import likelihood_mnist as experiment
from pyattr.attribution.magic import Adam
from pyattr.diffusion import bits_per_dimension, dequantise, log_likelihood


@pytest.fixture
def run(tmp_path, monkeypatch):
    settings = {
        "WIDTHS": (4, 32, 32, 32),
        "TRAINING": {"steps": 3, "batch_size": 4},
        "ADAM": Adam(learning_rate=1e-2),
        "SOLVER": {"solver": "euler", "steps": 1},
        "TRIALS": (("euler", 1), ("heun", 1)),
        "TRIAL_PROBES": 1,
        "IMAGES": 3,
        "BATCH": 2,
        "PROBES": 2,
        "AT_A_TIME": 392,
        "SHOWN": 2,
    }
    for name, value in settings.items():
        monkeypatch.setattr(experiment, name, value)
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (12, 28, 28), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "digits.npz", **arrays)

    def run(stage, *more, data="digits.npz"):
        folders = [str(tmp_path / "out"), "--data", str(tmp_path / data), "--work", str(tmp_path / "work"), *more]
        monkeypatch.setattr(sys, "argv", ["likelihood_mnist", stage, *folders])
        experiment.main()

    return run


def test_the_experiment(run, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / "work"
    run("train")
    assert (work / "training" / "state-00000003.safetensors").is_file()
    # Stopped after three batches, it goes on with the fourth.
    asked, bits = [], experiment.bits

    def stopped(model, images, numbers, divergence, **options):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(divergence)
        return bits(model, images, numbers, divergence, **options)

    monkeypatch.setattr(experiment, "bits", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("evaluate")
    monkeypatch.setattr(experiment, "bits", bits)
    made = {path: path.stat().st_mtime_ns for path in work.glob("bits-*")}
    assert len(made) == 3
    run("evaluate", "--part", "1/2")
    assert len(list(work.glob("bits-*"))) == 6  # those of odd numbers, the second of which was there
    run("evaluate")
    assert len(list(work.glob("bits-*"))) == 8 and all(path.stat().st_mtime_ns == then for path, then in made.items())
    run("report")
    found = json.loads((out / "likelihood_mnist.json").read_text())
    Image.open(out / "likelihood_mnist.png").verify()
    assert list(found["bits per dimension"]) == ["digits", "rotated", "averaged", "noise"]
    assert found["machine"]["threads"] == 1 and found["machine"]["commit"]
    # The last image of a kind by the library itself, beside none of the others.
    torch.set_num_threads(1)
    args = type("args", (), {"data": tmp_path / "digits.npz", "work": work})
    model = experiment.trained(args, type("quiet", (), {"progress": staticmethod(lambda *_: None)}))
    test = experiment.digits(tmp_path / "digits.npz")[1]
    for kind, images in experiment.images_of_kinds(test, 3).items():
        x = dequantise(images[2:], ids=[2])
        expected = log_likelihood(model, x, experiment.SDE, solver="euler", steps=1, at_a_time=392).log_prob
        row = found["bits per dimension"][kind]
        assert row["exact"]["images"][2] == pytest.approx(float(bits_per_dimension(expected, 784)), rel=1e-4)
        assert row["exact"]["mean"] == pytest.approx(np.mean(row["exact"]["images"]), rel=1e-4)
        assert row["exact"]["median"] == sorted(row["exact"]["images"])[1]
        assert row["hutchinson"]["images"] != row["exact"]["images"]
    means = [row["exact"]["mean"] for row in found["bits per dimension"].values()]
    assert found["in the expected order"] == (means == sorted(means))


def test_numbers_of_steps_are_compared(run, tmp_path):
    run("converge")
    found = json.loads((tmp_path / "out" / "likelihood_convergence.json").read_text())
    assert [(row["solver"], row["steps"]) for row in found["digit and noise"]] == [
        ("euler", 1),
        ("heun", 1),
        ("rk45", None),
    ]
    assert all(len(row["bits"]) == 2 for row in found["digit and noise"])
    assert found["seconds of one digit in full"]["seconds"] > 0


def test_the_kinds_of_images(run):
    test = torch.arange(20 * 784, dtype=torch.int32).remainder(251).to(torch.uint8).view(20, 1, 28, 28)
    kinds = experiment.images_of_kinds(test, 4)
    fewer = experiment.images_of_kinds(test, 2)
    for kind, images in kinds.items():
        assert images.shape == (4, 1, 28, 28) and images.dtype == torch.uint8
        assert torch.equal(fewer[kind], images[:2])
    digit, turned = kinds["digits"][0, 0], kinds["rotated"][0, 0]
    assert turned[0, 0] == digit[0, 27] and turned[27, 0] == digit[0, 0]
    other = 2 * kinds["averaged"][0].int() - kinds["digits"][0].int()
    assert any(bool((other - image.int()).abs().max() <= 1) for image in test)
    assert not any(torch.equal(a, b) for a, b in zip(kinds["averaged"], kinds["digits"], strict=True))


def test_an_archive_without_digits(run, tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"--data must hold train_images, test_images, got .*other\.npz with images"):
        run("train", data="other.npz")


def test_more_images_go_on_from_fewer(run, tmp_path):
    run("train")
    run("evaluate", "--images", "1")
    run("evaluate", "--images", "3")
    run("evaluate", "--images", "1")  # nothing to do, and nothing is lost
    run("report", "--images", "3")
    found = json.loads((tmp_path / "out" / "likelihood_mnist.json").read_text())["bits per dimension"]
    assert all(len(found[kind]["exact"]["images"]) == 3 for kind in experiment.KINDS)
    test = experiment.digits(tmp_path / "digits.npz")[1]
    few, more = (experiment.images_of_kinds(test, count) for count in (1, 3))
    assert all(torch.equal(few[kind], more[kind][:1]) for kind in experiment.KINDS)
