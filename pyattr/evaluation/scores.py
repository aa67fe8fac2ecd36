"""Scores of a method as a small file, with what they are the scores of."""

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.conditioned import as_examples, examples_hash
from ..diffusion.storage import load_tensors, save_tensors
from .ground_truth import GroundTruth, query_hashes, subset_hashes

_LARGEST = 15  # a row's largest entry lies in [2^14, 2^15) in the file: half of what float16 holds
_LEAST = -126  # exponents of float32 that are not denormal


def plain(signed: bool, settings: dict) -> bool:
    """:attr:`Scores.plain`, from what a file says of its scores."""
    return signed and settings.get("readout", "signed") == "signed"


@dataclass(frozen=True, eq=False)
class Scores:
    """What a method says of every training image for every query.

    Attributes:
        matrix: [Q, N] float32, positive = proponent.
        method: its name, for people.
        signed: whether negative scores mean opponents; else scores are magnitudes.
        settings: what else decided the scores, JSON-serialisable. A setting "readout" says what was read out of them already,
            "chosen" how the values of settings were found that were not given but follow from the others: TRAK's own lambda is
            ``{"lambda": "automatically"}``.
        images: what identifies the training images and their order, as in :class:`~pyattr.evaluation.GroundTruth`.
        queries: [Q] what identifies each query.
        asked: what identifies the subsets whose models the method asked; a ground truth with one of them is no judge of it.
        tuned: of scores at values that a ground truth chose, by setting: the "grid" of values, and those "chosen" for each
            group of queries, in the order of the folds of :func:`~pyattr.evaluation.two_folds`. JSON-serialisable; no setting,
            as it follows from them.

    Raises:
        ValueError: the shapes do not go together.
    """

    matrix: np.ndarray
    method: str
    signed: bool
    settings: dict
    images: str
    queries: tuple[str, ...]
    asked: tuple[str, ...] = ()
    tuned: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.matrix.ndim != 2 or self.matrix.dtype != np.float32:
            raise ValueError(
                f"Scores: matrix must be float32 of shape [Q, N], got {self.matrix.dtype}, {list(self.matrix.shape)}"
            )
        if len(self.queries) != len(self.matrix):
            raise ValueError(f"Scores: queries must be as many as rows, {len(self.matrix)}, got {len(self.queries)}")

    @property
    def plain(self) -> bool:
        """Whether readouts are of these scores: they have a sign, and are no readout already."""
        return plain(self.signed, self.settings)

    @classmethod
    def of(
        cls,
        method: str,
        scores,
        images,
        queries,
        *,
        signed: bool,
        settings: dict,
        pool: GroundTruth | None = None,
        tuned: dict | None = None,
    ) -> "Scores":
        """The scores of a method with what identifies their rows and columns.

        Args:
            method: its name, for people.
            scores: [Q, N] real.
            images: the training images in the order of the columns, [N, C, H, W] in the dtype that the ground truth saw.
            queries: likewise in the order of the rows, [Q, C, H, W] or :class:`~pyattr.diffusion.Samples`.
            signed, settings, tuned: see :class:`Scores`.
            pool: of :class:`~pyattr.attribution.EmpiricalInfluence` and :class:`~pyattr.attribution.Datamodel`, and of nothing
                else: whose subsets' models they asked.

        Raises:
            TypeError, ValueError: images or queries are no images, or not as many as columns and rows.
        """
        scores = scores.detach().to("cpu", torch.float32).numpy() if isinstance(scores, Tensor) else scores
        matrix = np.array(scores, np.float32)
        images = as_examples(images, "Scores", "images")
        if matrix.ndim == 2 and matrix.shape[1] != len(images):
            raise ValueError(
                f"Scores: scores must have a column for each of {len(images)} images, got {matrix.shape[1]}"
            )
        asked = () if pool is None else tuple(subset_hashes(pool.masks))
        hashes = tuple(query_hashes(queries, "Scores"))
        return cls(matrix, method, signed, settings, examples_hash(images), hashes, asked, tuned or {})

    def take(self, rows) -> "Scores":
        """Those of some queries.

        Args:
            rows: integers, a boolean array, or a slice.
        """
        which = np.arange(len(self.matrix))[rows]
        queries = tuple(self.queries[row] for row in which)
        return dataclasses.replace(self, matrix=self.matrix[which], queries=queries)

    def rows_in(self, truth: GroundTruth) -> np.ndarray:
        """Which columns of a ground truth's outputs belong to the rows of these scores, [Q] int64.

        Where the ground truth does not say what its queries are, they are taken to be those of the scores, in their order.

        Raises:
            ValueError: the training images are others, or in another order, a query is not among those of the truth, or the
                method asked models of its subsets.
        """
        if self.asked and set(self.asked) & set(subset_hashes(truth.masks)):
            raise ValueError(
                f"Scores: {self.method} has asked models of this ground truth's subsets and knows their losses: judge it by "
                "others"
            )
        if (truth.images is not None and truth.images != self.images) or truth.masks.shape[1] != self.matrix.shape[1]:
            raise ValueError(
                f"Scores: {self.method} scored other training images than those of the ground truth, or in another order"
            )
        if truth.queries is None:
            if len(truth.query_ids) != len(self.matrix):
                raise ValueError(
                    f"Scores: {self.method} scored {len(self.matrix)} queries, and the ground truth has {len(truth.query_ids)}"
                )
            return np.arange(len(self.matrix))
        return truth.rows_of(self.queries, f"Scores: {self.method}")

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all: float16 [Q, N] and a float32 factor for each query.

        The factor is a power of two that brings a query's largest finite score into [2^14, 2^15), so that nothing overflows
        and a score t is rounded by at most 2^-11 of itself. Where abs t is below 2^-28 of the query's largest, it is rounded by
        at most 2^-39 of that largest, and below this it becomes 0: such scores may tie in what is read back. NaN and infinity
        stay.

        Raises:
            OSError: the folder is missing, read-only or full.

        Extra memory: the matrix once more.
        """
        sizes = np.where(np.isfinite(self.matrix), np.abs(self.matrix), 0).max(1, initial=0)  # [Q]
        exponents = np.where(sizes > 0, np.maximum(np.frexp(sizes)[1] - _LARGEST, _LEAST), 0)
        rounded = np.ldexp(self.matrix, -exponents[:, None]).astype(np.float16)
        factors = np.ldexp(np.float32(1), exponents).astype(np.float32)
        save_tensors(
            path,
            {"scores": torch.tensor(rounded), "factors": torch.tensor(factors)},
            {"kind": "scores", **{name: getattr(self, name) for name in _RECORDED}},
        )

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Scores":
        """Read a file of :meth:`save` and check every byte.

        Raises:
            FileNotFoundError, pyattr.diffusion.DamagedFileError: there is none, or its bytes changed.
            ValueError: it is something else.
        """
        tensors, record = load_tensors(path)
        if record.get("kind") != "scores":
            raise ValueError(f"Scores: {path} does not hold scores: it is a file of kind {record.get('kind')!r}")
        matrix = (tensors["scores"].float() * tensors["factors"][:, None]).numpy()  # exact
        told = {name: record[name] for name in _RECORDED if name in record}
        return cls(matrix, **{name: tuple(value) if name in _TUPLES else value for name, value in told.items()})


_TUPLES = ("queries", "asked")
_RECORDED = ("method", "signed", "settings", "images", "tuned", *_TUPLES)
