"""Baselines that ask no diffusion model: which training images look like the query."""

import torch
from torch import Tensor

from ..diffusion.features import Features
from ..diffusion.images import as_images
from .products import inner_products
from .queries import query_images

SIMILARITIES = ("dot", "cosine")
_IMAGES = 1024  # whose pixels are features at a time
_LEVELS = 255  # pixels are whole numbers of this unit, so that sums and differences of 8-bit images are exact


class RawPixel:
    """Which training images have the pixels of the query.

    ``tau(q, n) = x_q . x_n`` over the C H W pixels in [-1, 1], or the cosine of the angle between the two.

    Sign: positive where pixels agree. It is a similarity, taken for influence because an image that looks like the query is
    likely to have taught the model to make it; nothing is derived from the model, and a negative number marks what looks
    opposite, not an opponent.

    Args:
        similarity: "dot" or "cosine".
        centre: take the mean training image off both sides first. Published figures do not; without it images share a large
            part that says nothing.

    Attributes:
        name: for people.
        signed: False: negative scores do not mean opponents.

    Raises:
        ValueError: ``similarity`` is neither.

    Source: Zheng et al., "Intriguing Properties of Data Attribution on Diffusion Models", ICLR 2024, section 4.
    """

    signed = False

    def __init__(self, similarity: str = "cosine", *, centre: bool = False):
        self.similarity = check_similarity(similarity, "RawPixel")
        self.centre = centre
        self.name = f"pixel {'inner product' if similarity == 'dot' else 'cosine'}"
        self._train: Tensor | None = None

    def fit(self, train) -> "RawPixel":
        """Keep the training images.

        Args:
            train: [N, C, H, W] uint8, or floating point in [-1, 1]; not copied.

        Returns:
            self.

        Raises:
            TypeError, ValueError: not as above, or none.

        Extra memory: that of 1024 images in float64.
        """
        train = as_images(train, "RawPixel", "train")
        if len(train) == 0:
            raise ValueError("RawPixel: train must hold at least one image, got none")
        self._train, self._mean = train, None
        if self.centre:
            self._mean = sum(pixels.sum(0) for _, pixels in self._pixels(train).blocks()) / len(train)  # [C H W]
        return self

    def scores(self, queries) -> Tensor:
        """Similarities of all training images to each query.

        Args:
            queries: images [Q, C, H, W] (uint8, or floating point in [-1, 1]) or :class:`~pyattr.diffusion.Samples`.

        Returns:
            [Q, N] float32, rounded once from float64; a cosine is 0 where either side is zero.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            TypeError, ValueError: the queries are not as above, or of another size.

        Extra memory: that of 2048 images in float64, and of :func:`~pyattr.attribution.products.inner_products`.
        """
        if self._train is None:
            raise RuntimeError("RawPixel: fit must be called before scores")
        queries = query_images(queries, "RawPixel")
        check_shape(queries, self._train, "RawPixel")
        pixels = self._pixels(queries), self._pixels(self._train)
        return inner_products(*pixels, cosine=self.similarity == "cosine")

    def _pixels(self, images: Tensor) -> Features:
        """Rows of pixels in float64, made as they are asked for; for cosines in units of 1 / 255."""
        unit = 1 if self.similarity == "cosine" else _LEVELS

        def rows(start: int) -> Tensor:  # -> [R, C H W]
            block = images[start : start + _IMAGES].flatten(1).to("cpu", torch.float64)
            block = (block * 2 - _LEVELS if images.dtype == torch.uint8 else block * _LEVELS) / unit
            return block if self._mean is None else block - self._mean

        starts = list(range(0, len(images), _IMAGES))
        return Features(torch.arange(len(images)), images[0:1].numel(), torch.float64, rows, starts)


def check_similarity(similarity: str, op: str) -> str:
    """One of :data:`SIMILARITIES`.

    Raises:
        ValueError: it is none.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"{op}: similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    return similarity


def check_shape(queries: Tensor, train: Tensor, op: str) -> None:
    """Refuse queries of another size than the training images.

    Raises:
        ValueError: the message has both sizes.
    """
    if queries.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"{op}: queries must have the shape of the training images, {list(train.shape[1:])}, "
            f"got {list(queries.shape[1:])}"
        )
