"""Pictures of what was found of an encoded ensemble."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.images import to_bytes
from ..evaluation import Agreement, Convergence, Extractor, pca
from ..evaluation.encoded import ClassResults
from ..files import whole_file
from .grid import matplotlib, write_grid

SHOWN, COLUMNS = 12, 20  # rows and ablations in a picture, at most
REAL = 500  # images of each class whose features span the plane
COLOURED = 10  # classes that get a colour of their own


def class_grid(
    path: str | os.PathLike,
    samples: Tensor,
    without: Tensor,
    classes: np.ndarray,
    distances: np.ndarray,
    names: Sequence[str],
) -> None:
    """Samples with each class ablated; the most influential ablation framed.

    Args:
        path: the PNG.
        samples: [Q, C, H, W] in [-1, 1].
        without: [Q, K, C, H, W], without each of K classes.
        classes: [Q], the samples' predicted classes.
        distances: [Q, K], how far each ablation moves a sample.
        names: of the K classes. Beyond 20 they are not shown, nor framed.

    Raises:
        ImportError: matplotlib is missing.
    """
    # One of each class where there is one, then whatever comes.
    order = sorted(range(len(classes)), key=lambda q: (np.sum(classes[:q] == classes[q]), q))[:SHOWN]
    before, after = to_bytes(samples).numpy(), to_bytes(without[:, :COLUMNS]).numpy()
    most = distances.argmax(1)
    write_grid(
        path,
        [[before[q], *after[q]] for q in order],
        columns=["sample", *(f"no {name}" for name in names[:COLUMNS])],
        labels=[f"a {names[classes[q]]}" for q in order],
        marked=[(row, 1 + int(most[q])) for row, q in enumerate(order) if most[q] < COLUMNS],
        title="Framed: the ablation that changes the sample most",
    )


def class_plane(
    path: str | os.PathLike,
    extractor: Extractor,
    images,
    labels: np.ndarray,
    samples: Tensor,
    without: Tensor,
    results: ClassResults,
    names: Sequence[str],
) -> None:
    """The plane in which the features of real images spread most, with samples before and after the ablation of their class.

    Args:
        path: the PNG.
        extractor: of the features.
        images, labels: real images [N, C, H, W] and their classes [N], in [0, K).
        samples, without: see :func:`class_grid`.
        results: of them.
        names: of the K classes; the ten that most samples are of are coloured, the others grey.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: see :func:`~pyattr.evaluation.pca`.
    """
    classes = results.classes
    shown = np.concatenate([np.flatnonzero(labels == c)[:REAL] for c in range(len(names))])
    features = extractor(images[shown]).numpy()
    plane = pca(features)
    own = without[np.arange(len(classes)), classes]
    common = np.argsort(-np.bincount(classes, minlength=len(names)), kind="stable")[:COLOURED]
    coloured = set(common.tolist())
    figure = matplotlib().Figure(figsize=(9.5, 4.2))
    real = plane.project(features)
    for axes, (title, made) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        (("samples", samples), ("the same without their own class", own)),
        strict=True,
    ):
        points = plane.project(extractor(made))
        for c, name in enumerate(names):
            colour, label = (f"C{c % 10}", name) if c in coloured else ("0.6", None)
            axes.scatter(*real[labels[shown] == c].T, s=2, alpha=0.15, color=colour, linewidths=0)
            axes.scatter(*points[classes == c].T, s=14, color=colour, edgecolors="black", linewidths=0.4, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"first component, {100 * plane.explained[0]:.0f}% of the variance", fontsize=8)
        axes.set_ylabel(f"second, {100 * plane.explained[1]:.0f}%", fontsize=8)
        axes.tick_params(labelsize=7)
    axes.legend(title="predicted class\nof the sample", fontsize=7, title_fontsize=7)
    _write(path, figure)


def agreement_plot(path: str | os.PathLike, agreements: Mapping[str, Agreement], settling: Convergence) -> None:
    """Correlations of guessed with true counterfactuals, where there are any, and how samples settle as members are added.

    Args:
        path: the PNG.
        agreements: by the names of the ways of guessing; empty: only the second.
        settling: see :func:`~pyattr.evaluation.convergence`.

    Raises:
        ImportError: matplotlib is missing.
    """
    kinds = (("pearson", "of pixels"), ("spearman", "of sizes")) if agreements else ()
    figure = matplotlib().Figure(figsize=(10 if agreements else 3.6, 3.4))
    *boxes, lines = figure.subplots(1, len(kinds) + 1, squeeze=False)[0]
    for axes, (kind, told) in zip(boxes, kinds, strict=True):
        values = [getattr(found, kind).ravel() for found in agreements.values()]
        axes.boxplot([v[~np.isnan(v)] for v in values], widths=0.6, flierprops={"markersize": 2})
        axes.set_xticks(range(1, len(values) + 1), [_in_two_lines(name) for name in agreements], fontsize=7)
        axes.set_title(f"{kind.capitalize()}'s correlation {told}", fontsize=9)
    counts = np.arange(1, settling.to_full.shape[1] + 1)
    lines.plot(counts, settling.to_full.mean(0), marker=".", label="to the full ensemble")
    lines.plot(counts[:-1], settling.successive.mean(0), marker=".", label="to the next")
    lines.set_title("L2 between samples of nested ensembles", fontsize=9)
    lines.set_xlabel("members", fontsize=8)
    lines.legend(fontsize=7)
    for axes in (*boxes, lines):
        axes.tick_params(labelsize=7)
    _write(path, figure)


def _in_two_lines(name: str) -> str:
    words = name.split()
    half = len(words) // 2
    return "\n".join(" ".join(part) for part in (words[:half], words[half:]) if part)


def _write(path: str | os.PathLike, figure: Any) -> None:
    figure.tight_layout()
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)
