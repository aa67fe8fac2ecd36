"""Choosing a hyperparameter by the linear datamodeling score without being judged by the same numbers."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.stats

from .lds import LDS, Interval, lds

SPLITS = ("queries", "subsets")
BENCHMARK = "tuned on the benchmark"


@dataclass(frozen=True, eq=False)
class Tuned:
    """The outcome of :func:`tune_on_split`.

    Attributes:
        parts: the score of each fold, by the value that was chosen without it; one score if tuned on the benchmark. Of a split
            of the queries the folds follow each other as in ``folds``.
        chosen: the value of each part.
        folds: [Q] or [M], the fold of each query or subset; all 0 if tuned on the benchmark.
        curve: the mean LDS over all queries and subsets for each value, in the order of the grid: for plots, not for reports.
        label: how it was tuned, to be printed beside the number.
        score: the :class:`LDS` of all queries, each by the value that was chosen on others; None for a split of the subsets,
            which no LDS of all subsets belongs to.
    """

    parts: tuple[LDS, ...]
    chosen: tuple[Hashable, ...]
    folds: np.ndarray
    curve: dict[Hashable, float]
    label: str
    score: LDS | None

    @property
    def per_query(self) -> np.ndarray:
        """[Q] float64; of a split of the subsets the mean over its halves."""
        if self.score is not None:
            return self.score.per_query
        return np.mean([part.per_query for part in self.parts], 0)

    @property
    def mean(self) -> float:
        """What to report."""
        return float(self.per_query.mean()) if len(self.per_query) else float("nan")

    @property
    def interval(self) -> Interval:
        """Of :attr:`mean`, as that of :class:`LDS`, for the values as they were chosen: choosing is not repeated."""
        if self.score is not None:
            return self.score.interval
        # Halves of the subsets are independent of each other.
        error = np.sqrt(np.sum([part.standard_error**2 for part in self.parts])) / len(self.parts)
        freedom = sum(part.num_subsets - 1 for part in self.parts)
        half = float(scipy.stats.t.ppf((1 + self.parts[0].level) / 2, freedom) * error)
        return Interval(self.mean - half, self.mean + half)


def two_folds(count: int, seed: int = 0) -> np.ndarray:
    """Two random folds of equal sizes, or sizes that differ by one: [count] int64, 0 and 1; those of the first half are 0.

    They depend on the count and the seed alone, so that all methods are tuned and reported alike.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 0x74756E65])).permutation(count)
    folds = np.empty(count, np.int64)
    folds[order] = np.arange(count) >= (count + 1) // 2
    return folds


def tune_on_split(
    grid: Iterable[tuple[Hashable, object]],
    masks,
    outputs,
    *,
    split: str = "queries",
    folds=None,
    seed: int = 0,
    tune_on_benchmark: bool = False,
    level: float = 0.95,
) -> Tuned:
    """Choose a hyperparameter by mean LDS on one half and report it on the other, both ways round.

    ``value of fold f = argmax over values of mean LDS(scores of the value, without fold f)``; each query (or half of the
    subsets) is then scored by the value that was chosen without it, so that all of them count and none was tuned on.

    Args:
        grid: (value, scores [Q, N]) for each value; read once, and one matrix of scores is held at a time. The first of equal
            means is chosen.
        masks, outputs, level: see :func:`lds`.
        split: what is halved: "queries", or "subsets" (M at least 6). Queries share the models of a subset, and with them what
            makes one model better than another for all of them; halves of the subsets share no model.
        folds: [Q] or [M] integers 0 and 1 instead of :func:`two_folds`.
        seed: of :func:`two_folds`, in [0, 2^32).
        tune_on_benchmark: choose by the very numbers that are reported, as published tables do. This overstates, the more so
            the more values there are, and is labelled.

    Returns:
        :class:`Tuned`. A NaN in a mean excludes the value; NaN is reported where every value has one.

    Raises:
        ValueError: the grid is empty or names a value twice, a fold is empty, or see :func:`lds`.

    Extra memory: that of :func:`lds` for five values, whatever the grid.

    Source: Stone, "Cross-validatory choice and assessment of statistical predictions", 1974; Zheng et al., ICLR 2024
    (D-TRAK), whose code chooses lambda on the benchmark.
    """
    if split not in SPLITS:
        raise ValueError(f"tune_on_split: split must be one of {', '.join(SPLITS)}, got {split!r}")
    masks, outputs = np.asarray(masks), np.asarray(outputs)
    by_query = split == "queries"
    count = outputs.shape[1] if by_query else len(masks)
    if tune_on_benchmark:
        folds = np.zeros(count, np.int64)
    else:
        folds = two_folds(count, seed) if folds is None else np.asarray(folds)
        if folds.shape != (count,) or set(folds.tolist()) != {0, 1}:
            raise ValueError(f"tune_on_split: folds must be {count} integers, 0 and 1 and both of them, got {folds!r}")
    parts = range(1 if tune_on_benchmark else 2)
    best: list[tuple[float, Hashable, LDS] | None] = [
        None for _ in parts
    ]  # mean of the others, value, score of the fold
    curve: dict[Hashable, float] = {}
    for value, scores in grid:
        if value in curve:
            raise ValueError(f"tune_on_split: grid must name each value once, got {value!r} twice")
        whole = lds(scores, masks, outputs, level=level)
        curve[value] = whole.mean
        halves = [
            whole.take(folds == f) if by_query else lds(scores, masks[folds == f], outputs[folds == f], level=level)
            for f in parts
        ]
        for f in parts:
            chosen_by = halves[0 if tune_on_benchmark else 1 - f].mean
            if best[f] is None or chosen_by > best[f][0] or (np.isnan(best[f][0]) and not np.isnan(chosen_by)):
                best[f] = chosen_by, value, halves[f]
    if not curve:
        raise ValueError("tune_on_split: grid must hold a value, got none")
    reported = tuple(part for _, _, part in best)
    label = BENCHMARK if tune_on_benchmark else f"tuned on other {split}"
    if tune_on_benchmark:
        score = reported[0]
    else:
        score = LDS.gathered(reported, folds) if by_query else None
    return Tuned(reported, tuple(value for _, value, _ in best), folds, curve, label, score)
