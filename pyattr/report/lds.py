"""Pictures of linear datamodeling scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation import LDS
from ..files import whole_file
from .grid import matplotlib, write_grid
from .ranking import shown_count, strongest

BINS = 16  # of ranks, each way
BANDS = 4  # lines whose intervals can be told apart
LOGARITHMIC = 8.0  # the ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """How a method's score depends on one setting: its values, and the score at each.

    Scores may also be given as (mean, low, high) in percent; NaN for low and high where there is no interval.
    """

    label: str
    values: Sequence[float]
    scores: Sequence[LDS | tuple[float, float, float]]


def lds_bars(
    path: str | os.PathLike, methods: Mapping[str, Mapping[str, LDS]], groups: Sequence[str], note: str = ""
) -> None:
    """A bar for each method and group of queries with its interval; the best on top.

    Args:
        path: the PNG.
        methods: scores by method and group of queries; a method may lack a group.
        groups: in their order.
        note: under the axis.

    Raises:
        ImportError: matplotlib is missing.
    """
    order = sorted(methods, key=lambda name: _height(methods[name]))
    figure = matplotlib().Figure(figsize=(7.2, 1.1 + len(order) * (0.14 + 0.17 * len(groups))))
    axes = figure.subplots()
    height = 0.8 / len(groups)
    for g, group in enumerate(groups):
        centre, low, high = np.array([_percent(methods[name].get(group)) for name in order]).T
        places = np.arange(len(order)) + (g - (len(groups) - 1) / 2) * height
        axes.barh(places, centre, 0.9 * height, color=f"C{g % 10}", alpha=0.75, label=group)
        axes.errorbar(centre, places, xerr=[centre - low, high - centre], fmt="none", ecolor="0.2", elinewidth=0.9)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set_xlabel("LDS, percent; 95% over subsets" + (f"\n{note}" if note else ""), fontsize=8)
    _plain(axes)
    if len(groups) > 1:
        axes.legend(fontsize=8, loc="lower right", frameon=False)
    _write(path, figure)


def lds_lines(path: str | os.PathLike, panels: Mapping[str, Sequence[Line]], setting: str) -> None:
    """The score against a setting, a panel for each group of queries; of up to four lines with intervals as bands.

    Args:
        path: the PNG.
        panels: lines by the names of the groups.
        setting: its name.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = matplotlib().Figure(figsize=(0.6 + 3.9 * len(panels), 3.9))
    boxes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    values = [value for lines in panels.values() for line in lines for value in line.values]
    banded = False
    for axes, (group, lines) in zip(boxes, panels.items(), strict=True):
        for line in lines:
            colour = f"C{labels.index(line.label) % 10}"
            means, low, high = np.array([_percent(score) for score in line.scores]).T
            axes.plot(line.values, means, marker=".", color=colour, label=line.label)
            if len(labels) <= BANDS and not np.isnan(low).all():
                axes.fill_between(line.values, low, high, color=colour, alpha=0.12, linewidth=0)
                banded = True
        if min(values) > 0 and max(values) >= LOGARITHMIC * min(values):
            axes.set_xscale("log")
        axes.axhline(0, color="0.2", linewidth=0.8)
        axes.set_title(group, fontsize=9)
        axes.set_xlabel(setting, fontsize=8)
        _plain(axes)
    bands = "; bands: 95% over subsets" if banded else ""
    boxes[0].set_ylabel(f"LDS, percent{bands}", fontsize=8)
    figure.legend(
        *_handles(boxes),
        fontsize=7,
        loc="upper center",
        ncols=min(3, len(labels)),
        frameon=False,
        bbox_to_anchor=(0.5, 0),
    )
    _write(path, figure)


def prediction_plot(
    path: str | os.PathLike, predicted: np.ndarray, losses: np.ndarray, score: LDS, method: str
) -> None:
    """What scores predicted for one query's losses against what they were, and the ranks of all queries together.

    Args:
        path: the PNG.
        predicted: [Q, M], sums of scores over the subsets.
        losses: [M, Q].
        score: of them; the query shown is the one of median LDS.
        method: its name.

    Raises:
        ImportError: matplotlib is missing.
    """
    count = len(losses)
    shown = int(np.argsort(score.per_query, kind="stable")[len(score.per_query) // 2])
    figure = matplotlib().Figure(figsize=(8, 3.7))
    one, every = figure.subplots(1, 2)
    one.plot(predicted[shown], losses[:, shown], ".", color="C0", markersize=6)
    one.set_title(f"query {shown}, of median LDS: {100 * score.per_query[shown]:.1f}%", fontsize=9)
    one.set_xlabel("sum of the scores of a subset", fontsize=8)
    one.set_ylabel("loss of the model trained on it", fontsize=8)
    ranks = [(count + 1 + side.doubled) / 2 for side in (score.predicted, score.true)]
    # Expected counts are equal; darker is more than that.
    bins = min(BINS, count)
    *_, image = every.hist2d(ranks[0].ravel(), count + 1 - ranks[1].ravel(), bins=bins, cmap="Blues")
    every.set_title(f"ranks of {len(predicted)} queries, LDS {100 * score.mean:.1f}%", fontsize=9)
    every.set_xlabel("predicted rank among the subsets", fontsize=8)
    every.set_ylabel("rank of the loss", fontsize=8)
    bar = figure.colorbar(image, ax=every)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("pairs of query and subset", fontsize=8)
    figure.suptitle(method, fontsize=10)
    for axes in (one, every):
        _plain(axes)
    _write(path, figure)


def top_and_bottom(
    path: str | os.PathLike,
    queries: np.ndarray,
    labels: Sequence[str],
    images: np.ndarray,
    scores: np.ndarray,
    *,
    method: str,
    signed: bool,
    top: int = 6,
) -> None:
    """Queries with their strongest training images: proponents, and opponents where a method has them.

    Args:
        path: the PNG.
        queries: [Q, C, H, W] uint8.
        labels: of them.
        images: [N, C, H, W] uint8, the training images.
        scores: [Q, N], finite.
        method: its name.
        signed: whether negative scores mean opponents.
        top: how many of each, at most half of the images.

    Raises:
        ImportError: matplotlib is missing.
    """
    count = shown_count(top, len(images))
    parts = [strongest(scores, count)] + ([strongest(scores, count, largest=False)] if signed else [])
    gap: list[np.ndarray | None] = [None]
    rows = [
        [query, *(image for part in parts for image in [*gap, *images[part[q]]])] for q, query in enumerate(queries)
    ]
    names = [("+", "−")[p] + str(k + 1) for p in range(len(parts)) for k in range(count)]
    columns = ["query", *(name for p in range(len(parts)) for name in ["", *names[p * count : (p + 1) * count]])]
    what = "strongest proponents (+) and opponents (−)" if signed else "strongest proponents"
    write_grid(path, rows, columns=columns, labels=labels, title=f"{method}: {what}")


def _height(scores: Mapping[str, LDS]) -> float:
    """Of a bar among the others, the smallest on top; what has no number comes last."""
    mean = np.mean([score.mean for score in scores.values()]) if scores else np.nan
    return np.inf if np.isnan(mean) else -float(mean)


def _percent(score: LDS | tuple[float, float, float] | None) -> tuple[float, float, float]:
    if isinstance(score, LDS):
        return (100 * score.mean, *(100 * end for end in score.interval))
    return (np.nan,) * 3 if score is None else score


def _handles(boxes: Sequence[Any]) -> tuple[list, list]:
    found = {}
    for axes in boxes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _write(path: str | os.PathLike, figure: Any) -> None:
    figure.tight_layout()
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)
