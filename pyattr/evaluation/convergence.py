"""How an ensemble's samples settle as members are added, and the plane in which features spread most."""

from dataclasses import dataclass

import numpy as np

from .agreement import as_array
from .frechet import as_features


def nested_codes(num_members: int, *, seed: int = 0) -> np.ndarray:
    """Codes whose ablation leaves nested subsets of an ensemble: one member, two, ..., all.

    The members come in a random order; code j has a bit for each member that is not among the first j + 1.

    Args:
        num_members: n, in [1, 64].
        seed: in [0, 2^32).

    Returns:
        [n] uint64; the last is 0, the ensemble itself.

    Raises:
        ValueError: an argument is not as above.

    Source: Dai, Gifford 2023, figure 4.
    """
    if not 1 <= num_members <= 64:
        raise ValueError(f"nested_codes: num_members must lie in [1, 64], got {num_members}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"nested_codes: seed must lie in [0, {2**32 - 1}], got {seed}")
    order = np.random.Generator(np.random.Philox(key=[seed, 0x6E657374])).permutation(num_members)
    left = np.uint64(2**num_members - 1)
    codes = np.empty(num_members, np.uint64)
    for j, member in enumerate(order):
        left &= ~(np.uint64(1) << np.uint64(member))
        codes[j] = left
    return codes


@dataclass(frozen=True, eq=False)
class Convergence:
    """Euclidean distances over pixels.

    Attributes:
        to_full: [Q, S], from the samples of each subset to those of the last, the full ensemble.
        successive: [Q, S - 1], between the samples of one subset and the next.
    """

    to_full: np.ndarray
    successive: np.ndarray


def convergence(images) -> Convergence:
    """Distances between the samples of growing subsets of an ensemble, from the same noise.

    Args:
        images: [Q, S, ...], sample q of subset s; the last subset is the full ensemble. Torch or NumPy.

    Returns:
        :class:`Convergence`, in the unit of the pixels, float64.

    Raises:
        ValueError: another shape, or no subset.
    """
    images = as_array(images)
    if images.ndim < 3 or images.shape[1] == 0:
        raise ValueError(f"convergence: images must have shape [Q, S, ...] with S at least 1, got {list(images.shape)}")
    flat = images.reshape(*images.shape[:2], -1)
    return Convergence(np.linalg.norm(flat - flat[:, -1:], axis=2), np.linalg.norm(np.diff(flat, axis=1), axis=2))


@dataclass(frozen=True, eq=False)
class Principal:
    """Principal components of features.

    Attributes:
        mean: [D].
        directions: [K, D], of unit length, the entry of largest magnitude positive.
        explained: [K], the share of the total variance along each.
    """

    mean: np.ndarray
    directions: np.ndarray
    explained: np.ndarray

    def project(self, features) -> np.ndarray:
        """Coordinates of features, [N, D] -> [N, K]."""
        return (as_features(features, "pca", "features") - self.mean) @ self.directions.T


def pca(features, components: int = 2) -> Principal:
    """Principal components of features.

    Args:
        features: [N, D], torch or NumPy, N >= 2.
        components: K, at most min(N - 1, D).

    Returns:
        :class:`Principal`, float64; other features are projected onto the same plane by its :meth:`Principal.project`.

    Raises:
        ValueError: an argument is not as above, or all features are equal.
    """
    features = as_features(features, "pca", "features")
    limit = min(len(features) - 1, features.shape[1])
    if not 1 <= components <= limit:
        raise ValueError(
            f"pca: components must lie in [1, {limit}] for {len(features)} features of {features.shape[1]} numbers, "
            f"got {components}"
        )
    mean = features.mean(0)
    _, sizes, directions = np.linalg.svd(features - mean, full_matrices=False)
    total = np.square(sizes).sum()
    if not total > 0:
        raise ValueError("pca: features must not all be equal")
    directions = directions[:components]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    return Principal(mean, directions * np.sign(largest), np.square(sizes[:components]) / total)
