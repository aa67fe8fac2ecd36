"""How well guessed counterfactuals agree with true ones, and whether one way of guessing beats another."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from .inputs import as_numbers


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of guessed with true counterfactuals.

    Attributes:
        pearson: [Q, M] float64, for each counterfactual the correlation over pixels of its guessed and its true change; NaN
            where either change is the same in all pixels, or not finite in one.
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


@dataclass(frozen=True)
class PairedComparison:
    """Of two sets of numbers of the same units by Wilcoxon's signed-rank test.

    Attributes:
        statistic: the sum of the ranks of the units at which the first set is larger, among the units that differ.
        p_value: of the hypothesis that the differences lie evenly around 0 (two-sided), or tend to be negative (one-sided).
        effect: the share of units at which the first set is larger, those that do not differ counting half; 1/2 is no effect.
        difference: the median over units of first less second.
        count: of units that have a number in both sets.
    """

    statistic: float
    p_value: float
    effect: float
    difference: float
    count: int


def agreement(images, true, guessed) -> Agreement:
    """Compare guessed counterfactuals with true ones.

    Args:
        images: the samples, [Q, ...]; torch or NumPy.
        true: counterfactuals by ablation, [Q, M, ...].
        guessed: approximations of them, [Q, M, ...].

    Returns:
        :class:`Agreement`; float64.

    Raises:
        TypeError: not real numbers.
        ValueError: the shapes do not go together, or there is no counterfactual or no pixel.

    Extra memory: the changes twice in float64.

    Source: Dai, Gifford 2023, figure 5.
    """
    named = (("images", images), ("true", true), ("guessed", guessed))
    images, true, guessed = (as_numbers(x, "agreement", name) for name, x in named)
    if true.ndim < 3 or true.shape[:1] + true.shape[2:] != images.shape:
        raise ValueError(
            f"agreement: true must have shape [Q, M, ...] for images [Q, ...] of shape {list(images.shape)}, "
            f"got {list(true.shape)}"
        )
    if guessed.shape != true.shape:
        raise ValueError(
            f"agreement: guessed must have the shape of true, {list(true.shape)}, got {list(guessed.shape)}"
        )
    if 0 in true.shape[1:]:
        raise ValueError(
            f"agreement: true must hold at least one counterfactual of at least one pixel, got shape {list(true.shape)}"
        )
    flat = (*true.shape[:2], math.prod(true.shape[2:]))
    with np.errstate(invalid="ignore"):  # of infinities, which leave NaN
        true, guessed = ((x - images[:, None]).reshape(flat) for x in (true, guessed))  # [Q, M, D]
    sizes = [np.linalg.norm(x, axis=2) for x in (true, guessed)]  # [Q, M]
    spearman = [_correlation(*(scipy.stats.rankdata(s[q]) for s in sizes)) for q in range(len(images))]
    return Agreement(_correlation(true, guessed), np.array(spearman, np.float64))


def compare(first, second, *, alternative: str = "two-sided") -> Comparison:
    """Mann-Whitney U test of two sets of numbers; NaN (an undefined correlation) is left out and does not count.

    The p-value takes the numbers for independent. The correlations of an :class:`Agreement` are not: those of one sample share
    the sample, those of one item the item, and two ways of guessing were given the same counterfactuals. So n numbers say less
    than n independent ones, and the p-value is too small by an unknown factor: :func:`compare_paired` counts samples instead.
    The effect stays what it says.

    Args:
        first, second: numbers in any shape.
        alternative: "two-sided", or "greater": the first set tends to be larger.

    Raises:
        TypeError: not real numbers.
        ValueError: a set is empty, or the alternative is another.

    Source: Mann, Whitney 1947, by scipy.stats; Dai, Gifford 2023, figure 5, for this use of it.
    """
    _check_alternative("compare", alternative)
    sets = [as_numbers(x, "compare", name).ravel() for name, x in (("first", first), ("second", second))]
    first, second = (x[~np.isnan(x)] for x in sets)
    for name, x in (("first", first), ("second", second)):
        if len(x) == 0:
            raise ValueError(f"compare: {name} must hold at least one number that is not NaN, got none")
    found = scipy.stats.mannwhitneyu(first, second, alternative=alternative)
    statistic = float(found.statistic)
    return Comparison(statistic, float(found.pvalue), statistic / (len(first) * len(second)), (len(first), len(second)))


def compare_paired(first, second, *, alternative: str = "two-sided") -> PairedComparison:
    """Wilcoxon signed-rank test over independent units, of which each has numbers in both sets.

    A unit, say a sample, counts once, by the difference of the medians of its numbers in the two sets, however many they are.
    The test asks that units be independent of each other; samples from different noise are, apart from the models and items
    that they share, of which a conclusion then is: these models, these items, other samples.

    Args:
        first, second: [Q, ...] numbers, row q of unit q, each set of its own shape; NaN is left out, and a unit with nothing
            else in one of the sets does not count.
        alternative: "two-sided", or "greater": the first set tends to be larger.

    Returns:
        :class:`PairedComparison`. Units of equal medians have no rank; the p-value is 1 where there are no others. It is exact
        for few units, and by the normal distribution for many, as scipy.stats decides.

    Raises:
        TypeError: not real numbers.
        ValueError: the numbers of units differ, none has a number in both sets, or the alternative is another.

    Source: Wilcoxon 1945, by scipy.stats.
    """
    _check_alternative("compare_paired", alternative)
    first, second = (as_numbers(x, "compare_paired", name) for name, x in (("first", first), ("second", second)))
    for name, x in (("first", first), ("second", second)):
        if x.ndim == 0:
            raise ValueError(f"compare_paired: {name} must have shape [Q, ...], got []")
    if len(first) != len(second):
        raise ValueError(f"compare_paired: second must have as many units as first, {len(first)}, got {len(second)}")
    medians = [np.array([_median(row) for row in x], np.float64) for x in (first, second)]
    a, b = (x[~np.isnan(medians).any(0)] for x in medians)
    if len(a) == 0:
        raise ValueError("compare_paired: at least one unit must have a number in both sets, got none")
    with np.errstate(invalid="ignore"):
        differences = np.where(a == b, 0.0, a - b)  # of infinities as well
    differ = differences[differences != 0]
    statistic, p_value = 0.0, 1.0
    if len(differ):
        # Of the two-sided test scipy tells the smaller of the two sums.
        statistic = float(scipy.stats.wilcoxon(differ, alternative="greater").statistic)
        p_value = float(scipy.stats.wilcoxon(differ, alternative=alternative).pvalue)
    effect = float(((differences > 0) + 0.5 * (differences == 0)).mean())
    return PairedComparison(statistic, p_value, effect, float(np.median(differences)), len(differences))


def _median(numbers: np.ndarray) -> float:
    """Of those that are not NaN; NaN where there are none."""
    numbers = numbers[~np.isnan(numbers)]
    return float(np.median(numbers)) if numbers.size else float("nan")


def _check_alternative(op: str, alternative: str) -> None:
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"{op}: alternative must be two-sided or greater, got {alternative!r}")


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, over the last axis; NaN where either is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        constant = (np.ptp(a, -1) == 0) | (np.ptp(b, -1) == 0)
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
        unit_a, unit_b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return np.where(constant, np.nan, np.clip((unit_a * unit_b).sum(-1), -1, 1))
