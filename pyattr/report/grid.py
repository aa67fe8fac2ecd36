"""Rows of small images with words beside them, as one PNG."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..files import whole_file

GUTTER = 0.12  # between images, in widths of one
INCHES = 0.62  # the width of an image on the page
LEAST_DPI = 100  # small images are enlarged to it, pixel by pixel
MARK = "#d62728"


def matplotlib() -> Any:
    """The package matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ImportError("pictures need the package matplotlib: install pyattr[report]") from None


def write_grid(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    marked: Collection[tuple[int, int]] = (),
    title: str = "",
) -> None:
    """Write a PNG of images in rows, whole or not at all.

    Args:
        path: the file.
        rows: of [C, H, W] uint8 images of one size, C 1 or 3; None leaves a place empty. Rows may differ in length.
        columns: what stands over the columns; none, or one each.
        labels: what stands before the rows; none, or one each.
        marked: (row, column) of images to frame.
        title: over all, on one line.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no image, images of several sizes, or as many words as there are neither rows nor columns for.

    Extra memory: the page, 3 bytes a pixel, and matplotlib's.
    """
    figure_module = matplotlib()
    first = next((image for row in rows for image in row if image is not None), None)
    if first is None:
        raise ValueError("write_grid: rows must hold at least one image, got none")
    sizes = {image.shape[1:] for row in rows for image in row if image is not None}
    if len(sizes) > 1:
        raise ValueError(f"write_grid: images must be of one size, got {sorted(sizes)}")
    width = max(map(len, rows))
    for name, words, wanted in (("columns", columns, width), ("labels", labels, len(rows))):
        if len(words) not in (0, wanted):
            raise ValueError(f"write_grid: {name} must be {wanted}, got {len(words)}")
    _, high, wide = first.shape
    gap = max(1, round(GUTTER * wide))
    page = np.full((len(rows) * (high + gap) + gap, width * (wide + gap) + gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            if image is not None:
                top, left = gap + r * (high + gap), gap + c * (wide + gap)
                # Grey spreads over three channels.
                page[top : top + high, left : left + wide] = image.transpose(1, 2, 0)
    inches = INCHES / (wide + gap)
    figure = figure_module.Figure(figsize=(page.shape[1] * inches, page.shape[0] * inches))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(page, interpolation="nearest" if wide <= LEAST_DPI * INCHES else "antialiased", aspect="auto")
    axes.xaxis.tick_top()
    axes.set_xticks([gap + c * (wide + gap) + wide / 2 - 0.5 for c in range(len(columns))], columns, fontsize=8)
    axes.set_yticks([gap + r * (high + gap) + high / 2 - 0.5 for r in range(len(labels))], labels, fontsize=8)
    axes.tick_params(length=0, pad=1)
    axes.set_frame_on(False)
    rectangle = importlib.import_module("matplotlib.patches").Rectangle
    for r, c in marked:
        corner = (c * (wide + gap) + gap / 2 - 0.5, r * (high + gap) + gap / 2 - 0.5)
        axes.add_patch(rectangle(corner, wide + gap, high + gap, fill=False, edgecolor=MARK, linewidth=1.6))
    if title:
        axes.set_title(title, fontsize=9, pad=8)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=max(LEAST_DPI, wide / INCHES), bbox_inches="tight", pad_inches=0.05)
