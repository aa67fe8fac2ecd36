"""Where the strongest images lie among all scores of a query: the geometry of a small inline SVG."""

from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 560.0, 92.0  # of the bars, in SVG units
BINS = 70


@dataclass(frozen=True)
class Histogram:
    """Bars (x, y, width, height), marks (x) and the axis of one query's scores, in SVG units."""

    bars: list[tuple[float, float, float, float]]
    proponents: list[float]
    opponents: list[float]
    zero: float | None
    low: float
    high: float
    tallest: int


def histogram(scores: np.ndarray, proponents: np.ndarray, opponents: np.ndarray) -> Histogram:
    """Bins over [min, max]; heights are log(1 + count), since the strongest images are few among many.

    Args:
        scores: [N], finite.
        proponents, opponents: indices into `scores` that get a mark.

    Returns:
        A Histogram.
    """
    low, high = float(scores.min()), float(scores.max())
    if high > low:
        unit = (scores.astype(np.float64) - low) / (high - low)  # [N] in 0..1
    else:
        unit = np.full(len(scores), 0.5)
    counts = np.bincount(np.minimum((unit * BINS).astype(np.int64), BINS - 1), minlength=BINS)
    heights = np.log1p(counts) / np.log1p(counts.max()) * HEIGHT
    marks = np.round(unit * WIDTH, 2)
    step = WIDTH / BINS
    bars = [
        (round(i * step, 2), round(HEIGHT - height, 2), round(step - 1.0, 2), round(height, 2))
        for i, height in enumerate(heights.tolist())
        if height > 0
    ]
    return Histogram(
        bars=bars,
        proponents=marks[proponents].tolist(),
        opponents=marks[opponents].tolist(),
        zero=round(-low / (high - low) * WIDTH, 2) if low < 0 < high else None,
        low=low,
        high=high,
        tallest=int(counts.max()),
    )
