"""How well guessed counterfactuals agree with true ones, and whether one way of guessing beats another."""

from dataclasses import dataclass

import numpy as np
import scipy.stats
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of guessed with true counterfactuals.

    Attributes:
        pearson: [Q, M] float64, for each counterfactual the correlation over pixels of its guessed and its true change; NaN
            where either change is the same in all pixels.
        spearman: [Q] float64, for each sample the rank correlation over its counterfactuals of the sizes (Euclidean norms) of
            the guessed and true changes; NaN where all sizes are equal.
    """

    pearson: np.ndarray
    spearman: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Of two sets of numbers by the Mann-Whitney U test.

    Attributes:
        statistic: U of the first set.
        p_value: of the hypothesis that neither set tends to be larger (two-sided), or that the first does not (one-sided).
        effect: U / (n_1 n_2), the probability that a number of the first set is larger than one of the second, ties counting
            half; 1/2 is no effect.
        counts: n_1 and n_2, without NaN.
    """

    statistic: float
    p_value: float
    effect: float
    counts: tuple[int, int]


def agreement(images, true, guessed) -> Agreement:
    """Compare guessed counterfactuals with true ones.

    Args:
        images: the samples, [Q, ...]; torch or NumPy.
        true: counterfactuals by ablation, [Q, M, ...].
        guessed: approximations of them, [Q, M, ...].

    Returns:
        :class:`Agreement`; float64.

    Raises:
        ValueError: the shapes do not go together.

    Extra memory: the changes twice in float64.

    Source: Dai, Gifford 2023, figure 5.
    """
    images, true, guessed = (as_array(x) for x in (images, true, guessed))
    if true.ndim < 3 or true.shape[:1] + true.shape[2:] != images.shape:
        raise ValueError(
            f"agreement: true must have shape [Q, M, ...] for images [Q, ...] of shape {list(images.shape)}, "
            f"got {list(true.shape)}"
        )
    if guessed.shape != true.shape:
        raise ValueError(
            f"agreement: guessed must have the shape of true, {list(true.shape)}, got {list(guessed.shape)}"
        )
    true, guessed = ((x - images[:, None]).reshape(*x.shape[:2], -1) for x in (true, guessed))  # [Q, M, D]
    sizes = [np.linalg.norm(x, axis=2) for x in (true, guessed)]  # [Q, M]
    spearman = [_correlation(*(scipy.stats.rankdata(s[q]) for s in sizes)) for q in range(len(images))]
    return Agreement(_correlation(true, guessed), np.array(spearman))


def compare(first, second, *, alternative: str = "two-sided") -> Comparison:
    """Mann-Whitney U test of two sets of numbers; NaN (an undefined correlation) is left out and does not count.

    Args:
        first, second: numbers in any shape.
        alternative: "two-sided", or "greater": the first set tends to be larger.

    Raises:
        ValueError: a set is empty, or the alternative is another.

    Source: Mann, Whitney 1947, by scipy.stats.
    """
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"compare: alternative must be two-sided or greater, got {alternative!r}")
    sets = [as_array(x).ravel() for x in (first, second)]
    first, second = (x[~np.isnan(x)] for x in sets)
    for name, x in (("first", first), ("second", second)):
        if len(x) == 0:
            raise ValueError(f"compare: {name} must hold at least one number that is not NaN, got none")
    found = scipy.stats.mannwhitneyu(first, second, alternative=alternative)
    statistic = float(found.statistic)
    return Comparison(statistic, float(found.pvalue), statistic / (len(first) * len(second)), (len(first), len(second)))


def as_array(x) -> np.ndarray:
    """float64, from torch or NumPy."""
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, over the last axis; NaN where either is constant."""
    constant = (np.ptp(a, -1) == 0) | (np.ptp(b, -1) == 0)
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_a, unit_b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return np.where(constant, np.nan, np.clip((unit_a * unit_b).sum(-1), -1, 1))
