"""How an ensemble's samples settle as members are added, and the plane in which features spread most."""

import math
from dataclasses import dataclass

import numpy as np

from ..ops._arguments import check_integer
from .frechet import as_features
from .inputs import as_numbers


def nested_codes(num_members: int, *, seed: int = 0) -> np.ndarray:
    """Codes whose ablation leaves nested subsets of an ensemble: one member, two, ..., all.

    The members come in a random order; code j has a bit for each member that is not among the first j + 1.

    Args:
        num_members: n, in [1, 64].
        seed: in [0, 2^32).

    Returns:
        [n] uint64; the last is 0, the ensemble itself.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford 2023, figure 4.
    """
    num_members = check_integer("nested_codes", "num_members", num_members, 1, 64)
    seed = check_integer("nested_codes", "seed", seed, 0, 2**32 - 1)
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
        TypeError: not real numbers.
        ValueError: another shape, or no subset.
    """
    images = as_numbers(images, "convergence", "images")
    if images.ndim < 3 or images.shape[1] == 0:
        raise ValueError(f"convergence: images must have shape [Q, S, ...] with S at least 1, got {list(images.shape)}")
    flat = images.reshape(*images.shape[:2], math.prod(images.shape[2:]))
    with np.errstate(invalid="ignore"):  # of infinities, which leave NaN
        changes = flat - flat[:, -1:], np.diff(flat, axis=1)
    return Convergence(*(np.linalg.norm(each, axis=2) for each in changes))


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
        """Coordinates of features, [N, D] -> [N, K].

        Raises:
            TypeError, ValueError: not real numbers of this shape.
        """
        features = as_features(features, "project", "features")
        if features.shape[1] != len(self.mean):
            raise ValueError(f"project: features must have {len(self.mean)} columns, got {features.shape[1]}")
        return (features - self.mean) @ self.directions.T


def pca(features, components: int = 2) -> Principal:
    """Principal components of features.

    Args:
        features: [N, D], torch or NumPy, N >= 2.
        components: K, at most min(N - 1, D).

    Returns:
        :class:`Principal`, float64; other features are projected onto the same plane by its :meth:`Principal.project`.

    Raises:
        TypeError, ValueError: an argument is not as above, or the features are all equal or not all finite.
    """
    features = as_features(features, "pca", "features")
    if len(features) < 2 or features.shape[1] == 0:
        raise ValueError(f"pca: features must have at least 2 rows and a column, got shape {list(features.shape)}")
    components = check_integer("pca", "components", components, 1, min(len(features) - 1, features.shape[1]))
    if not np.isfinite(features).all():
        raise ValueError("pca: features must be finite")
    mean = features.mean(0)
    _, sizes, directions = np.linalg.svd(features - mean, full_matrices=False)
    total = np.square(sizes).sum()
    if not total > 0:
        raise ValueError("pca: features must not all be equal")
    directions = directions[:components]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    return Principal(mean, directions * np.sign(largest), np.square(sizes[:components]) / total)
