"""The Fréchet distance between two sets of features, each taken for a Gaussian."""

import numpy as np
import scipy.linalg

from .inputs import as_numbers


def frechet_distance(first, second) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with the means and covariances of two sets.

    ``|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))``, covariances divided by N - 1. With S_i = A_i^T A_i the last trace is
    the sum of the singular values of A_1 A_2^T, which asks for no matrix square root: small variances lose no digits, and
    fewer features than dimensions are no special case.

    Args:
        first: [N, D] real numbers, torch or NumPy, N >= 2.
        second: [M, D], M >= 2.

    Returns:
        The distance, at least 0, in float64; NaN where a feature is not finite. Equal sets give 0 to rounding: about 1e-15
        times the sum of the variances.

    Raises:
        TypeError: not real numbers.
        ValueError: a shape is not as above.

    Extra memory: both sets in float64, and 3 D^2 numbers at most.

    Source: Dowson, Landau, "The Fréchet distance between multivariate normal distributions", 1982, equation 4; Heusel et al.,
    NeurIPS 2017, for its use on features of images.
    """
    first, second = (as_features(x, "frechet_distance", name) for x, name in ((first, "first"), (second, "second")))
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"frechet_distance: second must have as many columns as first, {first.shape[1]}, got {second.shape[1]}"
        )
    for name, x in (("first", first), ("second", second)):
        if len(x) < 2:
            raise ValueError(f"frechet_distance: {name} must have at least 2 rows, got {len(x)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    (mean_1, factor_1), (mean_2, factor_2) = _gaussian(first), _gaussian(second)
    cross = scipy.linalg.svdvals(factor_1 @ factor_2.T).sum() if factor_1.size else 0.0
    distance = np.square(mean_1 - mean_2).sum() + np.square(factor_1).sum() + np.square(factor_2).sum() - 2 * cross
    return max(0.0, float(distance))


def as_features(features, op: str, argument: str) -> np.ndarray:
    """[N, D] float64 from torch or NumPy.

    Raises:
        TypeError: not real numbers.
        ValueError: another shape.
    """
    array = as_numbers(features, op, argument)
    if array.ndim != 2:
        raise ValueError(f"{op}: {argument} must have shape [N, D], got {list(array.shape)}")
    return array


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N, D] -> [D], [R, D]
    """Mean, and a factor A of the covariance A^T A with R = min(N, D) rows."""
    mean = features.mean(0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    return mean, scipy.linalg.qr(centred, mode="r")[0][: features.shape[1]]
