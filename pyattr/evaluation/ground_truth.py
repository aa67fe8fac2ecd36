"""What scores are judged by: the losses of queries under models that were trained on subsets."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..diffusion.conditioned import Examples, as_examples, contents, examples_hash, with_conditions
from ..diffusion.sampling import Samples
from ..diffusion.storage import load_tensors, save_tensors, tensors_hash

_POOLS = {"evaluation": 0x6576616C, "retraining": 0x72657472}  # key word 1 of the draws
_PUBLISHED = {"evaluation": 42, "retraining": 42 + 512}  # random states of the first subset; the next are 2 apart
_PUBLISHED_LIMIT = 256  # then the states of one pool reach those of the other


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Losses of queries under models trained on subsets of the training images.

    Attributes:
        masks: [M, N] bool, which images (True = kept) the models of subset m were trained on.
        losses: [F, M, S, E, Q] float64: target function, subset, model seed, draw of the noise, query; means over timesteps.
        targets: the F names of the target functions, see :mod:`pyattr.diffusion.losses`.
        query_ids: [Q] int64, the ids that the noise of each query was a function of.
        images: what identifies the training images and their order (:func:`image_hashes` says how one image is); None: unknown.
        queries: what identifies each query; None: unknown.
        settings: how the models were trained and the losses computed.

    Raises:
        ValueError: the shapes do not go together.
    """

    masks: np.ndarray
    losses: np.ndarray
    targets: tuple[str, ...]
    query_ids: np.ndarray
    images: str | None
    queries: tuple[str, ...] | None
    settings: dict

    def __post_init__(self):
        if self.masks.ndim != 2 or self.masks.dtype != bool:
            raise ValueError(
                f"GroundTruth: masks must be bool of shape [M, N], got {self.masks.dtype}, {list(self.masks.shape)}"
            )
        if self.losses.ndim != 5 or self.losses.shape[:2] != (len(self.targets), len(self.masks)):
            raise ValueError(
                f"GroundTruth: losses must have shape [F, M, S, E, Q] with F = {len(self.targets)} and "
                f"M = {len(self.masks)}, got {list(self.losses.shape)}"
            )
        count = self.losses.shape[4]
        for name, given in (("query_ids", self.query_ids), ("queries", self.queries)):
            if given is not None and len(given) != count:
                raise ValueError(f"GroundTruth: {name} must be as many as losses, {count}, got {len(given)}")

    def outputs(self, target: str = "simple") -> np.ndarray:
        """What :func:`pyattr.evaluation.lds` takes: [M, Q] float64, the mean over model seeds and draws of the noise.

        Raises:
            ValueError: there is no such target function.
        """
        if target not in self.targets:
            raise ValueError(f"GroundTruth: target must be one of {', '.join(self.targets)}, got {target!r}")
        return self.losses[self.targets.index(target)].mean((1, 2))

    def check_images(self, images, op: str) -> None:
        """Refuse training images other than those of the masks.

        Raises:
            ValueError: they are others, in another order, or of another dtype.
        """
        images = as_examples(images, op, "train")
        if len(images) != self.masks.shape[1]:
            raise ValueError(
                f"{op}: train must be the {self.masks.shape[1]} images of the ground truth, got {len(images)}"
            )
        if self.images is not None and examples_hash(images) != self.images:
            raise ValueError(
                f"{op}: train must be the images of the ground truth, in their order and dtype, got others"
            )

    def rows(self, queries, op: str) -> np.ndarray:
        """Where queries lie in the columns of :meth:`outputs`.

        Args:
            queries: all of them or some, in any order: [Q', C, H, W] in the dtype they had, or Samples.
            op: for error messages.

        Returns:
            [Q'] int64. Images that are there several times are taken in the order in which they come.

        Raises:
            ValueError: a query is not among those of the ground truth, or these are unknown.
        """
        return self.rows_of(query_hashes(queries, op), op)

    def rows_of(self, hashes: Sequence[str], op: str) -> np.ndarray:
        """:meth:`rows` of queries that are known by what identifies them, see :func:`image_hashes`."""
        if self.queries is None:
            raise ValueError(
                f"{op}: the ground truth must say which queries it has the losses of, got one that does not"
            )
        places, met, rows = {}, Counter(), []
        for row, query in enumerate(self.queries):
            places.setdefault(query, []).append(row)
        for number, query in enumerate(hashes):
            if met[query] == len(places.get(query, ())):
                raise ValueError(
                    f"{op}: queries must be among those of the ground truth, in their dtype; number {number} is not"
                )
            rows.append(places[query][met[query]])
            met[query] += 1
        return np.array(rows, np.int64)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; ``docs/lds.md`` describes it.

        Raises:
            OSError: the folder is missing, read-only or full.

        Extra memory: the arrays twice.
        """
        save_tensors(
            path,
            {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in _ARRAYS},
            {"kind": "ground truth", **{name: getattr(self, name) for name in _RECORDED}},
        )

    @classmethod
    def open(cls, path: str | os.PathLike) -> "GroundTruth":
        """Read a file of :meth:`save` and check every byte of its arrays.

        Raises:
            FileNotFoundError, pyattr.diffusion.DamagedFileError: there is none, or its bytes changed.
            ValueError: it is something else.
        """
        tensors, record = load_tensors(path)
        if record.get("kind") != "ground truth":
            raise ValueError(
                f"GroundTruth: {path} does not hold a ground truth: it is a file of kind {record.get('kind')!r}"
            )
        targets, queries = tuple(record["targets"]), record["queries"]
        return cls(
            **{name: tensors[name].numpy() for name in _ARRAYS},
            targets=targets,
            queries=None if queries is None else tuple(queries),
            images=record["images"],
            settings=record["settings"],
        )


_ARRAYS = ("masks", "losses", "query_ids")
_RECORDED = ("targets", "images", "queries", "settings")


def image_hashes(images: Examples) -> list[str]:
    """What identifies each image, SHA-256 over dtype, shape and pixels, and its condition where it has one."""
    images, *conditions = contents(images).values()
    if not conditions:
        return [tensors_hash({"image": image}) for image in images]
    return [tensors_hash({"image": image, "condition": c}) for image, c in zip(images, *conditions, strict=True)]


def subset_hashes(masks: np.ndarray) -> list[str]:
    """What identifies each subset, [M, N] bool."""
    return [tensors_hash({"mask": torch.from_numpy(mask)}) for mask in masks]


def query_hashes(queries, op: str) -> list[str]:
    """:func:`image_hashes` of queries as methods take them, or of Samples.

    Raises:
        TypeError, ValueError: they are no images.
    """
    if isinstance(queries, Samples):
        queries = with_conditions(queries.images, queries.conditions)
    return image_hashes(as_examples(queries, op, "queries"))


def subsets(
    num_images: int,
    count: int,
    *,
    fraction: float = 0.5,
    labels=None,
    pool: str = "evaluation",
    seed: int = 0,
    official: bool = False,
) -> np.ndarray:
    """Random subsets of the training images, all of floor(fraction N) images.

    Args:
        num_images: N.
        count: M. Subset m is the same whatever M is, so that more can be added.
        fraction: of the images that are kept, in (0, 1).
        labels: [N] classes; each then keeps its share in every subset, to the nearest image. None: no regard to classes.
        pool: "evaluation", of the models that scores are judged by, or "retraining", of those that methods like
            :class:`~pyattr.attribution.Datamodel` learn from; the two are drawn independently.
        seed: in [0, 2^32).
        official: the subsets of the published benchmarks: scikit-learn's ``train_test_split`` with random states 42 + 2 m,
            and 554 + 2 m for "retraining"; at most 256 in a pool, from where on the two would be the same.

    Returns:
        [M, N] bool, True = kept.

    Raises:
        ValueError: an argument is not as above.
        ImportError: scikit-learn is needed and missing.

    Source: Park et al., "TRAK", ICML 2023, section 2; Zheng et al., ICLR 2024 (D-TRAK), and its published code.
    """
    kept = int(fraction * num_images) if 0 < fraction < 1 else 0
    if not 1 <= kept < num_images:
        raise ValueError(
            f"subsets: fraction of num_images must leave a part of them, got {fraction} of {num_images} images"
        )
    if count < 0 or (official and count > _PUBLISHED_LIMIT):
        raise ValueError(f"subsets: count must not be negative, and at most 256 if official, got {count}")
    if pool not in _POOLS:
        raise ValueError(f"subsets: pool must be one of {', '.join(_POOLS)}, got {pool!r}")
    if not 0 <= seed < 2**32 or (official and seed):
        raise ValueError(f"subsets: seed must lie in [0, {2**32 - 1}], and be 0 if official, got {seed}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (num_images,):
            raise ValueError(f"subsets: labels must have shape [{num_images}], got {list(labels.shape)}")
    masks = np.zeros((count, num_images), bool)
    for m, mask in enumerate(masks):
        if official:
            state = _PUBLISHED[pool] + 2 * m
            mask[
                _train_test_split()(np.arange(num_images), train_size=fraction, stratify=labels, random_state=state)[0]
            ] = 1
        else:
            rng = np.random.Generator(np.random.Philox(key=[seed, _POOLS[pool]], counter=[0, 0, 0, m]))
            mask[_draw(rng, np.zeros(num_images) if labels is None else labels, kept)] = 1
    return masks


def _draw(rng: np.random.Generator, labels: np.ndarray, kept: int) -> np.ndarray:
    """Indices of a random subset in which each class has its share; the images left over go to the largest fractions."""
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = kept * sizes / len(labels)
    take = np.floor(share).astype(np.int64)
    rest = np.lexsort((rng.random(len(sizes)), take - share))[: kept - take.sum()]
    take[rest] += 1
    order = rng.permutation(len(labels))
    chosen = [order[classes[order] == c][:n] for c, n in enumerate(take)]
    return np.concatenate(chosen)


def _train_test_split():
    try:
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError("subsets: official=True needs scikit-learn: install pyattr[evaluation]") from None
    return train_test_split
