"""How far sets of images, or pairs of images, lie apart, under the name that the features deserve."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arrays import to_torch
from ..diffusion.images import as_images, to_unit
from ..ops._arguments import check_integer
from .features import Extractor, as_colour, package, with_weights
from .frechet import frechet_distance

LPIPS_SIZE = 16  # VGG halves images four times


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
        TypeError, ValueError: an argument is not as above, or a set has fewer than 2 images; see
            :class:`~pyattr.evaluation.Extractor`.

    Extra memory: the features, and what the extractor and the distance need.
    """
    return fids([first], second, extractor, batch_size=batch_size)[0]


def fids(sets: Iterable, second, extractor: Extractor, *, batch_size: int = 64) -> list[Distance]:
    """:func:`fid` of each of several sets of images and one other, which goes through the network once.

    Args:
        sets: of images, each as ``first``.
        second, extractor, batch_size: see :func:`fid`.

    Raises:
        TypeError, ValueError: see :func:`fid`.

    Extra memory: that of :func:`fid`.
    """
    check_extractor("fid", extractor)
    second, sets = as_images(second, "fid", "second"), [as_images(first, "fid", "first") for first in sets]
    for name, images in (*(("first", first) for first in sets), ("second", second)):
        if len(images) < 2:
            raise ValueError(f"fid: {name} must hold at least 2 images, got {len(images)}")
    name = "FID" if extractor.standard else f"Fréchet distance of {extractor.name} features"
    others = extractor(second, batch_size=batch_size)
    return [Distance(name, frechet_distance(extractor(first, batch_size=batch_size), others)) for first in sets]


def feature_distances(first, second, extractor: Extractor, *, batch_size: int = 64) -> Distances:
    """Euclidean distance between the features of corresponding images.

    Args:
        first, second: [N, C, H, W] each, uint8 or floating point in [-1, 1].

    Returns:
        :class:`Distances`, [N].

    Raises:
        TypeError, ValueError: see :class:`~pyattr.evaluation.Extractor`; or the numbers of images differ.
    """
    check_extractor("feature_distances", extractor)
    first, second = _pairs("feature_distances", first, second)
    difference = extractor(first, batch_size=batch_size).double() - extractor(second, batch_size=batch_size).double()
    return Distances(f"{extractor.name}-feature distance", difference.norm(dim=1).numpy())


def change_sizes(images, changed) -> np.ndarray:
    """Euclidean distances between images and their counterfactuals, of pixels in [0, 1].

    ``|changed[q, m] - images[q]|``, :func:`l2` of each pair, without copies of the images.

    Args:
        images: [Q, C, H, W] uint8, or floating point where [-1, 1] is black to white; guesses may lie outside.
        changed: [Q, M, C, H, W], uint8 or floating point likewise.

    Returns:
        [Q, M] float64.

    Raises:
        TypeError, ValueError: not as above.

    Extra memory: that of one image's counterfactuals in float64, twice.
    """
    images, changed = (to_torch(x, "change_sizes", name)[0] for x, name in ((images, "images"), (changed, "changed")))
    for name, x in (("images", images), ("changed", changed)):
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"change_sizes: {name} must be uint8 or floating point, got {x.dtype}")
    if images.dim() != 4:
        raise ValueError(f"change_sizes: images must have shape [Q, C, H, W], got {list(images.shape)}")
    if changed.dim() != 5 or changed.shape[:1] + changed.shape[2:] != images.shape:
        raise ValueError(
            f"change_sizes: changed must have shape [Q, M, C, H, W] for images of shape {list(images.shape)}, "
            f"got {list(changed.shape)}"
        )
    like = torch.empty(0, dtype=torch.float64)
    found = np.empty(changed.shape[:2])
    for q, row in enumerate(changed.detach()):
        difference = (to_unit(row, like) - to_unit(images[q].detach(), like)) / 2
        found[q] = difference.flatten(1).norm(dim=1).numpy()
    return found


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


def lpips(first, second, extractor: Extractor | None = None, *, batch_size: int = 64) -> Distances:
    """Learned perceptual image patch similarity, with torchmetrics' VGG; or a distance of other features in its place.

    Args:
        first, second: [N, C, H, W] each, uint8 or floating point in [-1, 1]; grey images are given three equal channels. VGG
            needs 16 x 16 pixels or more.
        extractor: None for the standard network; with any other the result is :func:`feature_distances`, under its name.

    Returns:
        :class:`Distances`, [N], called LPIPS only where they are that of the standard network.

    Raises:
        ImportError: torchmetrics or torchvision is missing, or does not load.
        RuntimeError: the weights can be neither found nor downloaded, or the file is damaged.
        TypeError, ValueError: the images are not as above.

    Extra memory: the network's half a gigabyte of weights, read anew by each call, and its activations on ``batch_size`` pairs.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
    """
    if extractor is not None:
        check_extractor("lpips", extractor)
        return feature_distances(first, second, extractor, batch_size=batch_size)
    first, second = _pairs("lpips", first, second)
    batch_size = check_integer("lpips", "batch_size", batch_size, 1, 2**62)
    if first.shape[1] not in (1, 3) or min(first.shape[2:]) < LPIPS_SIZE:
        raise ValueError(
            f"lpips: images must have 1 or 3 channels of at least {LPIPS_SIZE} x {LPIPS_SIZE} pixels, "
            f"got {list(first.shape[1:])}"
        )
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


def check_extractor(op: str, extractor) -> None:
    if not isinstance(extractor, Extractor):
        given = type(extractor).__name__
        raise TypeError(
            f"{op}: extractor must be an Extractor, got {given}: a network is wrapped by Extractor(name, module), "
            "and a Classifier has one in its attribute extractor"
        )


def _pairs(op: str, first, second) -> tuple[Tensor, Tensor]:
    first, second = as_images(first, op, "first"), as_images(second, op, "second")
    if first.shape != second.shape:
        raise ValueError(f"{op}: second must have the shape of first, {list(first.shape)}, got {list(second.shape)}")
    if first.numel() == 0:
        raise ValueError(f"{op}: first must hold at least one image of one pixel, got {list(first.shape)}")
    return first, second
