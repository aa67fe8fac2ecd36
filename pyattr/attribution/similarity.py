"""Baselines that ask no diffusion model: which training images look like the query."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..diffusion.conditioned import as_examples, separate
from ..diffusion.features import Features
from ..diffusion.images import as_images
from ..diffusion.progress import Progress, silent
from ..evaluation.clip import CLIP, clip
from ..evaluation.features import Extractor
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
            train: [N, C, H, W] uint8, or floating point in [-1, 1]; or latents that are
                :class:`~pyattr.diffusion.Conditioned`, whose conditions play no part. Not copied.

        Returns:
            self.

        Raises:
            TypeError, ValueError: not as above, or none.

        Extra memory: that of 1024 images in float64.
        """
        train, _ = separate(as_examples(train, "RawPixel", "train"))
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
        queries, _ = separate(query_images(queries, "RawPixel"))
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


class CLIPSimilarity:
    """Which training images mean to CLIP, or to any other image encoder, what the query means to it.

    ``tau(q, n) = e(x_q) . e(x_n)``, features not normalised, or the cosine of the angle between the two.

    Sign: positive where features agree; as in :class:`RawPixel` a similarity, taken for influence.

    Args:
        extractor: e; None: CLIP's image encoder. Where its weights are not at hand, ``Classifier(...).extractor`` of
            :mod:`pyattr.evaluation` has features of the data's own, and the scores bear its name. Or a module, or any
            function, from images in [-1, 1], [B, C, H, W] float32, to [B, D].
        similarity: "dot" or "cosine".
        weights: of CLIP, see :func:`pyattr.evaluation.clip`; with ``extractor=None`` alone.
        batch_size: images that the encoder takes together.
        progress: stage "image features", counts images.

    Attributes:
        name: for people, of the encoder: "CLIP-feature similarity", "classifier-feature similarity", ...
        signed: False: negative scores do not mean opponents.

    Raises:
        ValueError, TypeError: an argument is not as above.
        ImportError, RuntimeError: CLIP cannot be had; the message says what to do instead.

    Source: Radford et al., ICML 2021; as a baseline of Zheng et al., ICLR 2024 (D-TRAK).
    """

    signed = False

    def __init__(
        self,
        extractor: Extractor | nn.Module | Callable[[Tensor], Tensor] | None = None,
        similarity: str = "cosine",
        *,
        weights: str | os.PathLike = CLIP,
        batch_size: int = 64,
        progress: Progress = silent,
    ):
        self.similarity = check_similarity(similarity, "CLIPSimilarity")
        self.extractor = clip(weights) if extractor is None else _as_extractor(extractor)
        self.name = f"{self.extractor.name}-feature similarity"
        self.batch_size, self.progress = batch_size, progress
        self._train: Features | None = None

    def fit(self, train) -> "CLIPSimilarity":
        """Compute the features of the training images.

        Args:
            train: [N, C, H, W] uint8, or floating point in [-1, 1].

        Returns:
            self.

        Raises:
            TypeError, ValueError: not as above, or none.

        Extra memory: the features, 4 N D bytes twice, and the encoder's for a batch.
        """
        self._train = self._features(as_images(train, "CLIPSimilarity", "train"))
        return self

    def scores(self, queries) -> Tensor:
        """Similarities of all training images to each query.

        Args:
            queries: images [Q, C, H, W] (uint8, or floating point in [-1, 1]) or :class:`~pyattr.diffusion.Samples`.

        Returns:
            [Q, N] float32; a cosine is 0 where either side is zero.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            TypeError, ValueError: the queries are not as above, or their features have another width.

        Extra memory: the queries' features, and that of :func:`~pyattr.attribution.products.inner_products`.
        """
        if self._train is None:
            raise RuntimeError("CLIPSimilarity: fit must be called before scores")
        images = query_images(queries, "CLIPSimilarity")
        if len(images) == 0:
            return torch.empty(0, len(self._train), dtype=torch.float32, device="cpu")
        ours = self._features(images)
        if ours.dim != self._train.dim:
            raise ValueError(
                f"CLIPSimilarity: queries must have {self._train.dim} features like the training images, got {ours.dim}"
            )
        return inner_products(ours, self._train, cosine=self.similarity == "cosine")

    def _features(self, images: Tensor) -> Features:
        found = self.extractor(images, batch_size=self.batch_size, progress=self.progress)  # [N, D]
        return Features.from_tensor(found, torch.arange(len(found)))


class _Function(nn.Module):
    """A function as a module, for :class:`~pyattr.evaluation.Extractor`."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _as_extractor(encoder: Extractor | nn.Module | Callable[[Tensor], Tensor]) -> Extractor:
    if isinstance(encoder, Extractor):
        return encoder
    if isinstance(encoder, nn.Module):
        return Extractor(type(encoder).__name__, encoder)
    if not callable(encoder):
        raise TypeError(
            f"CLIPSimilarity: extractor must be an Extractor, a module or a function, got {type(encoder).__name__}"
        )
    return Extractor(getattr(encoder, "__name__", type(encoder).__name__), _Function(encoder))


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
