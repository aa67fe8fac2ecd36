"""The experiment with MAGIC from end to end, on noise and a small network."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench.experiments import magic_baselines, magic_mnist
from pyattr.attribution.magic import Adam, LogLikelihood, NegativeLoss, Recipe
from pyattr.diffusion.storage import load_tensors


@pytest.fixture
def run(tmp_path, monkeypatch):
    settings = {
        "ITEMS": 12,
        "QUERIES": 2,
        "SUBSETS": 3,
        "SHARE": 0.1,
        "EXTREMES": 1,
        "TOP": 2,
        "WIDTHS": (4, 32, 32, 32),
        "RECIPE": Recipe(3, 4, Adam(learning_rate=1e-2)),
        "GRID": {"learning_rate": [1e-3, 1e-2]},
        "PHIS": {
            "loss": NegativeLoss(magic_mnist.LOSS, draws=4),
            "likelihood": LogLikelihood(magic_mnist.SDE, solver="euler", steps=1, divergence="hutchinson", bits=True),
        },
    }
    for name, value in settings.items():
        monkeypatch.setattr(magic_mnist, name, value)
    for name, value in {"PROJ_DIM": 8, "DRAWS": 2, "BATCH": 5}.items():
        monkeypatch.setattr(magic_baselines, name, value)
    rng = np.random.default_rng(0)
    arrays = {"test_labels": np.arange(6) % 3}
    for part, count in (("train", 20), ("test", 6)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
    np.savez(tmp_path / "digits.npz", **arrays)
    folders = ["--data", str(tmp_path / "digits.npz"), "--work", str(tmp_path / "work")]

    def run(stage, *more):
        monkeypatch.setattr(sys, "argv", ["magic_mnist", stage, str(tmp_path / "out"), *folders, *more])
        magic_mnist.main()

    return run


def test_the_experiment(run, tmp_path):
    torch.set_num_threads(1)
    out, work = tmp_path / "out", tmp_path / "work"
    run("search", "--part", "0/2")
    assert not (out / "magic_recipes.json").exists()
    run("search")
    found = json.loads((out / "magic_recipes.json").read_text())["recipes"]
    assert sorted(row["learning_rate"] for row in found) == [1e-3, 1e-2]
    run("retrain", "--part", "0/2")
    assert sorted(path.name for path in work.glob("network-*")) == [f"network-subset-{n}.safetensors" for n in (0, 2)]
    run("scores")
    scores, _ = load_tensors(work / "scores-loss.safetensors")
    assert scores["magic"].shape == scores["trak 0.01"].shape == scores["d-trak 1"].shape == (2, 12)
    run("retrain", "--part", "1/2")
    half = len(list(work.glob("network-*")))
    run("retrain")
    removed = magic_mnist.subsets(12)
    assert removed.sum(1).tolist() == [1, 1, 1]
    assert len(list(work.glob("network-*"))) == 3 + len(magic_mnist.singles(scores["magic"].numpy())) > half > 2
    for phi in ("loss", "likelihood"):
        if phi == "likelihood":
            run("scores", "--phi", phi)
            run("retrain", "--phi", phi)
        run("report", "--phi", phi)
        found = json.loads((out / f"magic_mnist_{phi}.json").read_text())
        assert set(found["spearman"]) == {"magic", "trak", "d-trak"}
        for ending in ("", "_top"):
            Image.open(out / f"magic_mnist_{phi}{ending}.png").verify()
    # The predictions and what became of them, once more by the method itself.
    train, queries = magic_mnist.digits(tmp_path / "digits.npz")
    fitted = magic_mnist.method("loss").fit(train)
    true = fitted.retrain(queries, torch.from_numpy(removed)) - fitted.values(queries)
    names = [f"subset-{number}" for number in range(3)]
    changes = magic_mnist._changes(
        type("args", (), {"phi": "loss", "work": work}), names, queries, fitted.values(queries).numpy()
    )
    np.testing.assert_allclose(changes, true.numpy(), rtol=1e-4, atol=1e-7)
    assert torch.equal(fitted.scores(queries), scores["magic"])
