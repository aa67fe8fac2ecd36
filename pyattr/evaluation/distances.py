"""How far sets of images, or pairs of images, lie apart, under the name that the features deserve."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.images import as_images, to_unit
from .features import Extractor, as_colour, package, with_weights
from .frechet import frechet_distance


@dataclass(frozen=True)
class Distance:
    """A number and what it may be called.

    Attributes:
        name: "FID", or "Fréchet distance of NAME features" for features of another network.
        value: the distance.
    """

    name: str
    value: float


@dataclass(frozen=True, eq=False)
class Distances:
    """Numbers, one for each pair of images, and what they may be called.

    Attributes:
        name: "LPIPS", "L2", or "NAME-feature distance".
        values: [N] float64.
    """

    name: str
    values: np.ndarray


def fid(first, second, extractor: Extractor, *, batch_size: int = 64) -> Distance:
    """Fréchet distance between the features of two sets of images (:func:`~pyattr.evaluation.frechet_distance`).

    Args:
        first, second: [N, C, H, W] and [M, C, H, W], uint8 or floating point in [-1, 1].
        extractor: :func:`~pyattr.evaluation.inception`, or any other.

    Returns:
        :class:`Distance`, called FID only where the extractor is the standard one.

    Raises:
        TypeError, ValueError: see :class:`~pyattr.evaluation.Extractor` and :func:`~pyattr.evaluation.frechet_distance`.

    Extra memory: the features, and what the extractor and the distance need.
    """
    features = (extractor(images, batch_size=batch_size) for images in (first, second))
    value = frechet_distance(*features)
    return Distance("FID" if extractor.standard else f"Fréchet distance of {extractor.name} features", value)


def feature_distances(first, second, extractor: Extractor, *, batch_size: int = 64) -> Distances:
    """Euclidean distance between the features of corresponding images.

    Args:
        first, second: [N, C, H, W] each, uint8 or floating point in [-1, 1].

    Returns:
        :class:`Distances`, [N].

    Raises:
        TypeError, ValueError: see :class:`~pyattr.evaluation.Extractor`; or the numbers of images differ.
    """
    first, second = _pairs("feature_distances", first, second)
    difference = extractor(first, batch_size=batch_size).double() - extractor(second, batch_size=batch_size).double()
    return Distances(f"{extractor.name}-feature distance", difference.norm(dim=1).numpy())


def l2(first, second) -> Distances:
    """Euclidean distance between the pixels, in [0, 1], of corresponding images.

    Args:
        first, second: [N, C, H, W] each, uint8 or floating point in [-1, 1].

    Raises:
        TypeError, ValueError: the images are not as above.
    """
    like = torch.empty(0, dtype=torch.float64)
    first, second = (to_unit(images, like) for images in _pairs("l2", first, second))
    return Distances("L2", ((first - second) / 2).flatten(1).norm(dim=1).numpy())


def lpips(first, second, *, batch_size: int = 64) -> Distances:
    """Learned perceptual image patch similarity, with torchmetrics' VGG.

    Args:
        first, second: [N, C, H, W] each, uint8 or floating point in [-1, 1]; grey images are given three equal channels.

    Returns:
        :class:`Distances`, [N].

    Raises:
        ImportError: torchmetrics or torchvision is missing.
        RuntimeError: the weights can be neither found nor downloaded.
        TypeError, ValueError: the images are not as above.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
    """
    first, second = _pairs("lpips", first, second)
    package("torchvision.models", "lpips")
    metric = package("torchmetrics.image.lpip", "lpips").LearnedPerceptualImagePatchSimilarity
    network = with_weights("lpips", lambda: metric(net_type="vgg", reduction="none"))
    like = torch.empty(0)
    values = []
    with torch.no_grad():
        for a, b in zip(first.split(batch_size), second.split(batch_size), strict=True):
            # Clamped, since torchmetrics refuses what rounding leaves outside.
            pair = (as_colour(to_unit(x, like), "lpips").clamp(-1, 1).contiguous() for x in (a, b))
            values.append(network(*pair).double().reshape(len(a)))
    return Distances("LPIPS", torch.cat(values).numpy())


def _pairs(op: str, first, second) -> tuple[Tensor, Tensor]:
    first, second = as_images(first, op, "first"), as_images(second, op, "second")
    if first.shape != second.shape:
        raise ValueError(f"{op}: second must have the shape of first, {list(first.shape)}, got {list(second.shape)}")
    if len(first) == 0:
        raise ValueError(f"{op}: first must hold at least one image, got none")
    return first, second
