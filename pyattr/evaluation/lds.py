"""The linear datamodeling score: how well scores predict what training on other subsets does to a query's loss."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from torch import Tensor

RESAMPLES, RESAMPLING_SEED = 64, 42  # of the published standard deviations
_PERCENTILE_RESAMPLES = 1000
_BLOCK = 1 << 17  # numbers in an array at a time


class Interval(NamedTuple):
    """Of confidence; NaN where it is not defined."""

    low: float
    high: float


class _Ranks:
    """The order of M numbers for each of Q queries, from which the ranks in any multiset of them follow by counting.

    Args:
        doubled: [Q, M], twice the average rank of each number minus the average of all; anything where one is unknown.
        unknown: [Q] bool, whether one of the numbers is NaN.
    """

    def __init__(self, doubled: np.ndarray, unknown: np.ndarray):
        self.doubled, self.unknown = doubled, unknown

    @classmethod
    def of(cls, values: np.ndarray) -> "_Ranks":
        """Of values [Q, M] float64."""
        unknown = np.isnan(values).any(1)
        known = np.where(unknown[:, None], 0, values)
        return cls(2 * scipy.stats.rankdata(known, axis=1) - (values.shape[1] + 1), unknown)

    def take(self, rows) -> "_Ranks":
        """Of some queries."""
        return _Ranks(self.doubled[rows], self.unknown[rows])

    @classmethod
    def joined(cls, parts: Sequence["_Ranks"]) -> "_Ranks":
        """Of the queries of one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("doubled", "unknown")))

    def above(self, queries: slice, some: slice) -> np.ndarray:  # -> [Q, M', M]
        """1 where one of some numbers lies above another, -1 where it lies below, 0 where they are equal."""
        own = self.doubled[queries]
        return np.sign(own[:, some, None] - own[:, None, :])

    def resampled(self, queries: slice, counts: np.ndarray) -> np.ndarray:  # [R, M] -> [Q, M, R]
        """The ranks when number m is there counts[m] times: how many lie below each minus how many above."""
        count = counts.shape[1]
        own = self.doubled[queries]
        out = np.empty((len(own), count, len(counts)))
        rows = max(1, _BLOCK // (max(1, len(own)) * count))
        for m in range(0, count, rows):
            above = self.above(queries, slice(m, m + rows))
            out[:, m : m + rows] = (above.reshape(-1, count) @ counts.T).reshape(*above.shape[:2], -1)
        return out


def _spearman(first: _Ranks, second: _Ranks) -> np.ndarray:  # -> [Q]
    """Spearman's correlation for each query; NaN where one side is constant or NaN."""
    a, b = first.doubled, second.doubled
    return _defined(first, second, _ratio(*((x * y).sum(1) for x, y in ((a, b), (a, a), (b, b)))))


def _spearman_resampled(first: _Ranks, second: _Ranks, counts: np.ndarray) -> np.ndarray:  # [R, M] -> [R, Q]
    """The same for each multiset of the M pairs."""
    queries, count = first.doubled.shape
    out = np.empty((len(counts), queries))
    rows = max(1, min(len(counts), _BLOCK // count))
    columns = max(1, _BLOCK // (rows * count))
    for r in range(0, len(counts), rows):
        some = counts[r : r + rows].astype(np.float64)
        for q in range(0, queries, columns):
            block = slice(q, q + columns)
            a, b = first.resampled(block, some), second.resampled(block, some)
            # Sums of integers, exact below 2^53.
            sums = (np.einsum("qmr,qmr->rq", x * some.T, y) for x, y in ((a, b), (a, a), (b, b)))
            out[r : r + rows, block] = _ratio(*sums)
    return _defined(first, second, out)


def _spearman_without_one(first: _Ranks, second: _Ranks) -> np.ndarray:  # -> [M, Q]
    """The same without each of the M pairs in turn: those above it lose a rank, twice over, and those below gain one."""
    queries, count = first.doubled.shape
    out = np.empty((count, queries))
    rows = max(1, min(count, _BLOCK // count))
    columns = max(1, _BLOCK // (rows * count))
    for m in range(0, count, rows):
        left = slice(m, m + rows)
        for q in range(0, queries, columns):
            block = slice(q, q + columns)
            a, b = (x.doubled[block][:, None] + x.above(block, left) for x in (first, second))  # [Q, M', M]
            own = [x.doubled[block, left] for x in (first, second)]  # what the pair itself would add
            pairs = ((a, b, own[0] * own[1]), (a, a, own[0] ** 2), (b, b, own[1] ** 2))
            out[left, block] = _ratio(*((np.einsum("qlm,qlm->ql", x, y) - z).T for x, y, z in pairs))
    return _defined(first, second, out)


def _ratio(ab: np.ndarray, aa: np.ndarray, bb: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.clip(ab / np.sqrt(aa * bb), -1, 1)


def _defined(first: _Ranks, second: _Ranks, correlations: np.ndarray) -> np.ndarray:  # [..., Q]
    correlations[..., first.unknown | second.unknown] = np.nan
    return correlations


def _drawn(count: int, num_resamples: int, seed: int) -> np.ndarray:  # -> [R, M]
    """How often each of ``count`` subsets is in each resample."""
    drawn = np.random.RandomState(seed).randint(0, count, (num_resamples, count))
    return np.stack([np.bincount(row, minlength=count) for row in drawn])


def _mean(values: np.ndarray) -> np.ndarray:  # [..., Q] -> [...]
    """Over queries; NaN for none of them."""
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


@dataclass(frozen=True, eq=False)
class _Resampled:
    per_query: np.ndarray
    num_subsets: int
    level: float

    def _correlations(self, counts: np.ndarray) -> np.ndarray:  # [R, M] -> [R, Q]
        raise NotImplementedError

    @property
    def mean(self) -> float:
        """Over the queries; NaN if one of them is NaN, or there are none."""
        return float(_mean(self.per_query))

    def resample(self, num_resamples: int = RESAMPLES, seed: int = RESAMPLING_SEED) -> np.ndarray:
        """The mean over queries in each of some resamples of the subsets, drawn with replacement as scipy draws them.

        Returns:
            [num_resamples] float64: the ``bootstrap_distribution`` of ``scipy.stats.bootstrap`` with ``random_state=seed``.

        Extra memory: 8 num_resamples (Q + 2 M) bytes, and about 10 MB. Time: num_resamples Q M^2.
        """
        return _mean(self._correlations(_drawn(self.num_subsets, num_resamples, seed)))

    @functools.cached_property
    def _resampled(self) -> np.ndarray:  # [64, Q]
        """In the published resamples."""
        return self._correlations(_drawn(self.num_subsets, RESAMPLES, RESAMPLING_SEED))

    @property
    def _without_one(self) -> np.ndarray:  # [M, Q]
        """Without one subset each."""
        raise NotImplementedError

    @property
    def bootstrap(self) -> np.ndarray:
        """[64] float64, the resampling behind the published numbers: 64 resamples, seed 42."""
        return _mean(self._resampled)

    @property
    def bootstrap_mean(self) -> float:
        """What the papers print before "+-": the mean of :attr:`bootstrap`, a few percent nearer to 0 than :attr:`mean`."""
        return float(self.bootstrap.mean())

    @property
    def bootstrap_std(self) -> float:
        """What the papers print after "+-": the standard deviation (of the population, ddof=0) of :attr:`bootstrap`."""
        return float(self.bootstrap.std())

    @functools.cached_property
    def bootstrap_interval(self) -> Interval:
        """Percentiles of 1,000 resamples at :attr:`level`. Ties pull it towards 0; :attr:`interval` has none."""
        tail = (1 - self.level) / 2
        return Interval(*np.quantile(self.resample(_PERCENTILE_RESAMPLES), [tail, 1 - tail]).tolist())

    @functools.cached_property
    def standard_error(self) -> float:
        """Of :attr:`mean`, by the delete-one jackknife over subsets."""
        count = self.num_subsets
        without = _mean(self._without_one)  # [M]
        return float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))

    @property
    def interval(self) -> Interval:
        """``mean -+ t standard_error``, t of Student's distribution with M - 1 degrees of freedom, at :attr:`level`."""
        half = float(scipy.stats.t.ppf((1 + self.level) / 2, self.num_subsets - 1)) * self.standard_error
        return Interval(self.mean - half, self.mean + half)


@dataclass(frozen=True, eq=False)
class LDS(_Resampled):
    """The outcome of :func:`lds`.

    Attributes:
        per_query: [Q] float64, in [-1, 1].
        num_subsets: M.
        level: of the intervals.
        mean, standard_error, interval: the score, and how far it may lie from that of infinitely many subsets.
        bootstrap, bootstrap_mean, bootstrap_std: as the papers report it.
        bootstrap_interval: percentiles of such resamples.
    """

    predicted: _Ranks = field(repr=False)
    true: _Ranks = field(repr=False)

    def _correlations(self, counts: np.ndarray) -> np.ndarray:
        return _spearman_resampled(self.predicted, self.true, counts)

    @functools.cached_property
    def _without_one(self) -> np.ndarray:
        return _spearman_without_one(self.predicted, self.true)

    def take(self, rows) -> "LDS":
        """The score over some of the queries; what was computed for all of them is used.

        Args:
            rows: integers, a boolean array, or a slice.
        """
        ranks = self.predicted.take(rows), self.true.take(rows)
        part = LDS(self.per_query[rows], self.num_subsets, self.level, *ranks)
        for name in ("_resampled", "_without_one"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][:, rows]
        return part

    @classmethod
    def gathered(cls, parts: Sequence["LDS"], which: np.ndarray) -> "LDS":
        """The score over the queries of several parts of one set of subsets.

        Args:
            parts: scores that :meth:`take` gave, of whatever method.
            which: [Q], the part of each query; those of a part follow each other in its order.
        """
        order = np.argsort(np.argsort(which, kind="stable"), kind="stable")
        per_query = np.concatenate([part.per_query for part in parts])[order]
        predicted, true = (
            _Ranks.joined([getattr(part, side) for part in parts]).take(order) for side in ("predicted", "true")
        )
        return cls(per_query, parts[0].num_subsets, parts[0].level, predicted, true)

    def minus(self, other: "LDS") -> "LDSDifference":
        """See :func:`lds_difference`; both scores must be of the same subsets, outputs and queries."""
        return LDSDifference(self.per_query - other.per_query, self.num_subsets, self.level, self, other)


@dataclass(frozen=True, eq=False)
class LDSDifference(_Resampled):
    """The outcome of :func:`lds_difference`: that of :func:`lds` for the first scores minus that for the second.

    Attributes:
        per_query: [Q] float64, in [-2, 2].
        first, second: the two scores.

    The others are those of :class:`LDS`, of the difference: both methods are asked about the same subsets every time, so
    that what their scores share cancels.
    """

    first: LDS = field(repr=False)
    second: LDS = field(repr=False)

    def _correlations(self, counts: np.ndarray) -> np.ndarray:
        return self.first._correlations(counts) - self.second._correlations(counts)

    @functools.cached_property
    def _resampled(self) -> np.ndarray:
        return self.first._resampled - self.second._resampled

    @functools.cached_property
    def _without_one(self) -> np.ndarray:
        return self.first._without_one - self.second._without_one


def lds(scores, masks, outputs, *, level: float = 0.95) -> LDS:
    """Linear datamodeling score of attribution scores.

    ``LDS(q) = Spearman over subsets m of (sum_n masks[m, n] scores[q, n], -outputs[m, q])``, with average ranks for ties: 1
    when the sums of scores put the models that were trained on the subsets into the order of their losses.

    Args:
        scores: [Q, N] real, positive = proponent: its presence lowers the query's loss. What is passed is what predicts: of a
            method whose scores are magnitudes (``signed`` False), that every image helps in proportion to its magnitude.
        masks: [M, N] boolean or 0 and 1: which images (1 = kept) model m was trained on; M at least 3.
        outputs: [M, Q] real, the loss of query q under model m; lower is better. The sign is changed here.
        level: of the confidence intervals, in (0, 1).

    Returns:
        :class:`LDS`, float64; resamples and intervals are computed when they are asked for. The LDS of a query is NaN where
        its scores or outputs hold NaN, or where all predictions or all outputs are equal; NaN enters the mean.

        ``interval`` is for the mean over these queries, if infinitely many subsets had been drawn as these were and a model
        had been trained on each: queries are fixed, subsets and the randomness of training are drawn. A subset with
        several models is one subset. It is the jackknife's rather than the bootstrap's since resampling with replacement
        makes ties, which no sample of subsets has, and with them correlations a few percent nearer to 0.

    Raises:
        ValueError: shapes do not go together, masks hold other numbers, or fewer than three subsets.

    Extra memory: 16 M Q bytes that stay with the result, and 8 (M + 64) Q once its uncertainty was asked for; about 20 MB.

    Source: Park et al., "TRAK", ICML 2023, definition 2.3; as evaluated for diffusion models by Zheng et al., ICLR 2024
    (D-TRAK), whose published numbers are ``bootstrap_mean`` and ``bootstrap_std``; Efron, Tibshirani, "An Introduction to the
    Bootstrap", 1993, section 11, for the jackknife.
    """
    scores = _array(scores)
    masks, outputs = _checked("lds", {"scores": scores}, masks, outputs, level)
    return _lds(scores, masks, _Ranks.of(-outputs.T), level)


def lds_difference(first, second, masks, outputs, *, level: float = 0.95) -> LDSDifference:
    """By how much the linear datamodeling score of one method exceeds another's, on the same subsets and queries.

    Args:
        first, second: [Q, N] scores of the two methods.
        masks, outputs, level: see :func:`lds`.

    Returns:
        :class:`LDSDifference`. An ``interval`` above 0 means that the first is better on these queries, beyond the chance of
        which subsets were drawn.

    Raises:
        ValueError: see :func:`lds`.

    Extra memory: three times that of :func:`lds`.
    """
    first, second = _array(first), _array(second)
    masks, outputs = _checked("lds_difference", {"first": first, "second": second}, masks, outputs, level)
    true = _Ranks.of(-outputs.T)
    one, other = (_lds(scores, masks, true, level) for scores in (first, second))
    return one.minus(other)


def _checked(op: str, scores: dict, masks, outputs, level: float) -> tuple[np.ndarray, np.ndarray]:
    masks, outputs = _float64(masks), _float64(outputs)
    if masks.ndim != 2 or len(masks) < 3:
        raise ValueError(f"{op}: masks must have shape [M, N] with M at least 3, got {list(masks.shape)}")
    if not np.isin(masks, (0, 1)).all():
        raise ValueError(f"{op}: masks must be 0 or 1, got {masks[~np.isin(masks, (0, 1))][0]:g}")
    if outputs.ndim != 2 or len(outputs) != len(masks):
        raise ValueError(f"{op}: outputs must have shape [M, Q] with M = {len(masks)}, got {list(outputs.shape)}")
    expected = (outputs.shape[1], masks.shape[1])
    for name, given in scores.items():
        if tuple(given.shape) != expected:
            raise ValueError(f"{op}: {name} must have shape [Q, N] = {list(expected)}, got {list(given.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"{op}: level must lie in (0, 1), got {level}")
    return masks, outputs


def _lds(scores, masks: np.ndarray, true: _Ranks, level: float) -> LDS:
    size = max(1, _BLOCK // max(1, masks.shape[1]))
    predictions = np.empty((len(scores), len(masks)))  # [Q, M]
    with np.errstate(invalid="ignore"):  # infinity times 0 is NaN, as it should be
        for q in range(0, len(scores), size):
            predictions[q : q + size] = _float64(scores[q : q + size]) @ masks.T
    predicted = _Ranks.of(predictions)
    return LDS(_spearman(predicted, true), len(masks), level, predicted, true)


def _array(x):
    """Anything whose rows :func:`_float64` takes, as it is."""
    return x if isinstance(x, Tensor) else np.asarray(x)


def _float64(x) -> np.ndarray:
    """From torch, whose bfloat16 NumPy does not know, or anything that NumPy takes."""
    return np.asarray(x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x, np.float64)
