"""Where a generated image and a training image match: one inline SVG with both, and lines between what belongs together."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..attribution.patch_matches import Explanation

GAP = 0.45  # between the two images, in widths of one
LEAST = 0.03  # share of the score that a region needs to be drawn; of lesser ones the heaviest alone
DARKEST = 150  # of 255: what plays no part stays visible
_SLOT = 0.17  # between the figures in the gap, likewise


@dataclass(frozen=True)
class Matched:
    """A training image and where it matches a query.

    Args:
        index: its column in the scores.
        explanation: for just this query.
    """

    index: int
    explanation: Explanation


@dataclass(frozen=True)
class Link:
    """One pair of regions, in pixels of the images; the training image lies ``1 + GAP`` widths to the right.

    Attributes:
        number: from 1; also its colour.
        query, image: rectangles (x, y, width, height).
        path: of the line between them, an SVG path.
        label: where its share stands.
        share: of the image's score, in percent.
    """

    number: int
    query: tuple[float, float, float, float]
    image: tuple[float, float, float, float]
    path: str
    label: tuple[float, float]
    share: float


@dataclass(frozen=True)
class Drawing:
    """The geometry of one pair of images.

    Attributes:
        width, height: of one image, in pixels.
        offset: x of the training image.
        heats: veils that hide what plays no part, as data URIs, of the query and of the training image.
        links: the heaviest first.
    """

    width: int
    height: int
    offset: float
    heats: tuple[str, str]
    links: list[Link]


def drawing(explanation: Explanation) -> Drawing:
    """The picture of one explanation."""
    height, width = explanation.query_map.shape
    offset = width * (1 + GAP)
    score = max(explanation.score, 1e-30)
    # The figures in the gap stand one under the other in the order of what they belong to, so that lines do not tangle.
    drawn = [m for i, m in enumerate(explanation.matches) if i == 0 or m.weight >= LEAST * score]
    order = sorted(drawn, key=lambda m: m.query[0] + m.image[0] + m.size[0])
    middle = width * (1 + GAP / 2)
    links = []
    for number, match in enumerate(drawn, 1):
        slot = height / 2 + (order.index(match) - (len(order) - 1) / 2) * _SLOT * height
        (r, c), (r2, c2), (tall, wide) = match.query, match.image, match.size
        x, y, x2, y2 = c + wide, r + tall / 2, offset + c2, r2 + tall / 2
        near, far = (x + middle) / 2, (x2 + middle) / 2
        path = (
            f"M{x:g} {y:g}C{near:g} {y:g} {near:g} {slot:g} {middle:g} {slot:g}"
            f"C{far:g} {slot:g} {far:g} {y2:g} {x2:g} {y2:g}"
        )
        links.append(
            Link(
                number,
                (c, r, wide, tall),
                (offset + c2, r2, wide, tall),
                path,
                (middle, slot),
                100 * match.weight / score,
            )
        )
    veils = (_veil(np.asarray(explanation.query_map)), _veil(np.asarray(explanation.image_map)))
    return Drawing(width, height, offset, veils, links)


def _veil(values: np.ndarray) -> str:  # [H, W] -> data URI
    """A black veil, thin where the values are large."""
    smooth = _smoothed(values)
    top = float(np.quantile(smooth, 0.98))
    light = np.sqrt(np.clip(smooth / top, 0, 1)) if top > 0 else np.ones_like(smooth)
    alpha = np.round(DARKEST * (1 - light)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.stack([np.zeros_like(alpha), alpha], -1), "LA").save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Averaged over 3 x 3 pixels with weights 1 2 1, the edges repeated."""
    padded = np.pad(values.astype(np.float64), 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
