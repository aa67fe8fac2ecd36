"""Pictures of counterfactuals: what is shown where."""

import numpy as np
import torch
from PIL import Image

from pyattr.evaluation import Counterfactuals, Effects
from pyattr.report import counterfactual
from pyattr.report.counterfactual import effects_plot, images_grid


def found(queries=3):
    originals = torch.zeros(queries, 1, 4, 4)
    images = torch.zeros(2, 2, queries, 1, 4, 4)
    images[0, 1], images[1, 1] = 1.0, -0.5
    images[1, 1, 1] = -1.0  # not by more than the first
    images[1, 1, 2], images[0, 1, 2] = 1.0, 0.2
    zeros = torch.zeros(2, 2, 1, 1, queries, dtype=torch.float64)
    removed = torch.zeros(2, 2, queries, 9, dtype=torch.bool)
    ids = torch.arange(queries) + 4
    return Counterfactuals(
        ("D-TRAK, squared", "random"), (1, 5), ids, originals, images, ("simple",), zeros[0, 0], zeros, removed, 4, {}
    )


def test_grid_shows_samples_beside_their_counterfactuals(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(counterfactual, "write_grid", lambda path, rows, **words: told.update(rows=rows, **words))
    images_grid(tmp_path / "x.png", found())
    assert told["columns"] == ["sample", "D-TRAK\nsquared", "random"] and told["labels"] == [
        "query 4",
        "query 5",
        "query 6",
    ]
    assert told["marked"] == [(0, 1), (1, 1), (2, 2)]
    assert told["title"] == "Made without the 5 images that each method names; framed: the largest change (L2)"
    assert [int(image[0, 0, 0]) for image in told["rows"][0]] == [128, 255, 64]
    images_grid(tmp_path / "x.png", found(20), 1)
    assert len(told["rows"]) == 12 and [int(image[0, 0, 0]) for image in told["rows"][0]] == [128, 128, 128]


def test_pictures_are_written(tmp_path):
    images_grid(tmp_path / "grid.png", found())
    values = np.random.default_rng(0).random((2, 2, 9))
    values[0, 0, 3] = np.nan  # its median is not drawn
    each = [Effects(name, ("D-TRAK", "random"), (1, 5), values) for name in ("L2", "pixel cosine")]
    effects_plot(tmp_path / "effects.png", each)
    for name in ("grid", "effects"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        red = (pixels[..., 0] - pixels[..., 1] > 100).sum()
        assert red > 20 and min(pixels.shape[:2]) > 100
