"""Rows of images as a PNG."""

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from pyattr.report.grid import write_grid


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colours(path):
    """How many pixels the page has of each colour that fills more than a thousandth of it."""
    page = pixels(path).reshape(-1, 3)
    found, counts = np.unique(page, axis=0, return_counts=True)
    return {tuple(c): n for c, n in zip(found.tolist(), counts.tolist(), strict=True) if n > len(page) / 1000}


def flat(*colour):
    return np.full((len(colour), 8, 8), 0, np.uint8) + np.array(colour, np.uint8)[:, None, None]


def test_images_lie_in_their_places(tmp_path):
    write_grid(tmp_path / "x.png", [[flat(200), flat(100, 0, 0)], [None, flat(0)]])
    page = pixels(tmp_path / "x.png")
    high, wide = page.shape[0] // 4, page.shape[1] // 4
    seen = [page[y * high, x * wide].tolist() for y in (1, 3) for x in (1, 3)]
    assert seen == [[200] * 3, [100, 0, 0], [255] * 3, [0] * 3]


def test_images_keep_their_shape(tmp_path):
    write_grid(tmp_path / "x.png", [[np.zeros((1, 8, 16), np.uint8)] * 2, [np.zeros((1, 8, 16), np.uint8)]])
    found = colours(tmp_path / "x.png")
    dark = pixels(tmp_path / "x.png").sum(2) < 30
    tall, wide = np.flatnonzero(dark.any(1)), np.flatnonzero(dark[: len(dark) // 3].any(0))
    assert (255, 255, 255) in found
    # Two images of 16 beside each other with a gap of two, two of 8 above each other with the same gap.
    assert (np.ptp(wide) + 1) / (np.ptp(tall) + 1) == pytest.approx(34 / 18, rel=0.05)


def test_words_and_frames_are_drawn(tmp_path):
    rows = [[flat(200), flat(200)]]
    write_grid(tmp_path / "plain.png", rows)
    write_grid(tmp_path / "framed.png", rows, marked=[(0, 1)])
    write_grid(tmp_path / "words.png", rows, columns=["one", "two"], labels=["row"], title="all")
    red = (0xD6, 0x27, 0x28)
    assert red not in colours(tmp_path / "plain.png")
    framed = pixels(tmp_path / "framed.png")
    where = np.argwhere((framed == red).all(2))
    assert len(where) and where[:, 1].min() > framed.shape[1] * 0.4  # around the second alone
    plain, words = pixels(tmp_path / "plain.png"), pixels(tmp_path / "words.png")
    assert words.shape[0] > plain.shape[0] and words.shape[1] > plain.shape[1]


def test_refusals(tmp_path, monkeypatch):
    path = tmp_path / "x.png"

    def refuses(error, told, *arguments, **options):
        with pytest.raises(error, match=f"^{re.escape(told)}$"):
            write_grid(path, *arguments, **options)
        assert not list(tmp_path.iterdir())

    refuses(ValueError, "write_grid: rows must hold at least one image, got none", [[], [None]])
    told = "write_grid: images must be of one size, got [(1, 1), (8, 8)]"
    refuses(ValueError, told, [[flat(0), flat(0)[:, :1, :1]]])
    refuses(ValueError, "write_grid: columns must be 2, got 1", [[flat(0)] * 2], columns=["a"])
    refuses(ValueError, "write_grid: labels must be 1, got 2", [[flat(0)]], labels=["a", "b"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refuses(ImportError, "pictures need the package matplotlib: install pyattr[report]", [[flat(0)]])


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_grid(path, [[flat(0)]])
    before = path.read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match=r"^full$"):
        write_grid(path, [[flat(9)]])
    assert path.read_bytes() == before
    assert Image.open(io.BytesIO(before)).size[0] > 8
