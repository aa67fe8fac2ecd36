"""Pictures of what retraining without the images that methods name did to samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..diffusion.images import to_bytes
from ..evaluation import Counterfactuals, Effects
from ..files import whole_file
from .grid import MARK, matplotlib, write_grid

SHOWN = 12  # queries in a picture, at most
_SPREAD = 0.28  # of the points of a method about its line
_GOLDEN = 0.6180339887  # its multiples, modulo 1, lie evenly


def effects_plot(path: str | os.PathLike, effects: Sequence[Effects]) -> None:
    """Each query's value as a point, and the median with its interval, by measure, number removed and method.

    Args:
        path: the PNG.
        effects: the measures, of the same methods and numbers.

    Raises:
        ImportError: matplotlib is missing.
    """
    methods, counts = effects[0].methods, effects[0].counts
    figure = matplotlib().Figure(figsize=(2.2 + 3.2 * len(effects), len(counts) * (0.9 + 0.36 * len(methods))))
    grid = figure.subplots(len(counts), len(effects), squeeze=False, sharex="col", sharey=True)
    for row, count in zip(grid, counts, strict=True):
        for axes, each in zip(row, effects, strict=True):
            _strips(axes, each, count)
            axes.set_title(each.name if len(counts) == 1 else f"{each.name}, {count} removed", fontsize=9)
        row[0].set_yticks(range(len(methods)), methods, fontsize=8)
        row[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("a point is a query; red: the median and 95% around it; dotted: the control's median", fontsize=8)
    figure.tight_layout()
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _strips(axes: Any, each: Effects, count: int) -> None:
    for place, method in enumerate(each.methods):
        values = each.of(method, count)
        spread = ((np.arange(len(values)) * _GOLDEN) % 1 - 0.5) * 2 * _SPREAD
        axes.plot(values, place + spread, ".", markersize=4, color="0.35" if place + 1 < len(each.methods) else "0.7")
        low, high = each.interval(method, count)
        axes.plot([low, high], [place, place], color=MARK, linewidth=1.6)
        axes.plot([each.median(method, count)], [place], "|", color=MARK, markersize=14, markeredgewidth=2)
    axes.axvline(each.median(each.methods[-1], count), color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def images_grid(path: str | os.PathLike, found: Counterfactuals, count: int | None = None) -> None:
    """Samples beside what models make of the same noise that never saw a method's images; the largest change framed.

    Args:
        path: the PNG.
        found: of them; the first 12 queries are shown.
        count: which number of removed images; None: the largest.

    Raises:
        ImportError: matplotlib is missing.
    """
    count = max(found.remove) if count is None else count
    shown = min(SHOWN, len(found.originals))
    before = to_bytes(found.originals[:shown]).numpy()
    after = to_bytes(found.images[:, found.remove.index(count), :shown]).numpy()  # [A, q, C, H, W]
    sizes = np.stack([found.l2.of(method, count)[:shown] for method in found.methods])  # [A, q]
    write_grid(
        path,
        [[before[q], *after[:, q]] for q in range(shown)],
        columns=["sample", *map(_in_lines, found.methods)],
        labels=[f"query {number}" for number in found.ids[:shown].tolist()],
        marked=[(q, 1 + int(most)) for q, most in enumerate(sizes.argmax(0))],
        title=f"Made without the {count} images that each method names; framed: the largest change (L2)",
    )


def _in_lines(name: str) -> str:
    return "\n".join(name.replace(",", "").split())
