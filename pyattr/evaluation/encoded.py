"""The figures of encoded ensembles from their images: class ablation, guessed counterfactuals, quality of the members."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .ablation import ClassAblation, class_ablation
from .agreement import Agreement, agreement, compare, compare_paired
from .convergence import Convergence
from .distances import Distance, Distances, change_sizes, fids
from .features import Extractor

# Ways of guessing counterfactuals, of EncodedEnsemble.approximate, as the paper calls them.
GUESSES = {"jacobian": "Jacobian", "last_step": "last step predicted noise", "members": "individual models"}


@dataclass(frozen=True, eq=False)
class ClassResults:
    """The outcome of :func:`class_results`.

    Attributes:
        classes: [Q] int64, the predicted classes of the samples.
        distances: [Q, K] float64 for each measure's name: how far the ablation of a class moves a sample.
        found: their statistics, by the same names.
    """

    classes: np.ndarray
    distances: dict[str, np.ndarray]
    found: dict[str, ClassAblation]

    def summary(self) -> dict:
        """What is worth keeping, by names for people."""
        first = next(iter(self.found.values()))
        return {
            "samples": len(self.classes),
            "samples by predicted class": np.bincount(self.classes, minlength=len(first.confusion)),
            "own ablation flips the class": first.own_flips,
            "another ablation flips the class": first.other_flips,
            "by distance": {
                name: {
                    "most influential ablation is of the sample's class": each.recovered,
                    "confusion": each.confusion,
                    "median of own ablation": np.median(each.own_distances),
                    "median of another": np.median(each.other_distances),
                    "own against another": each.distances,
                    "own against another, paired by sample": each.paired,
                }
                for name, each in self.found.items()
            },
        }


def class_results(
    samples: Tensor,
    without: Tensor,
    predict: Callable[[Tensor], np.ndarray],
    measures: Sequence[Callable[[Tensor, Tensor], Distances]],
) -> ClassResults:
    """What taking each class away does to samples, by several measures.

    Args:
        samples: [Q, C, H, W] floating point in [-1, 1].
        without: [Q, K, C, H, W], the same without each of K classes.
        predict: the classes that a classifier sees in images; the samples' lie in [0, K).
        measures: of the distance between corresponding images, :func:`~pyattr.evaluation.l2` for one.

    Returns:
        :class:`ClassResults`.

    Raises:
        ValueError: see :func:`~pyattr.evaluation.class_ablation`.

    Extra memory: the samples K times.

    Source: Dai, Gifford 2023, section 5.1.
    """
    count, ablated = without.shape[:2]
    classes = predict(samples)
    after = predict(without.flatten(0, 1)).reshape(count, ablated)
    before = samples[:, None].expand_as(without).flatten(0, 1)
    measured = [measure(before, without.flatten(0, 1)) for measure in measures]
    distances = {each.name: each.values.reshape(count, ablated) for each in measured}
    return ClassResults(
        classes, distances, {name: class_ablation(values, classes, after) for name, values in distances.items()}
    )


@dataclass(frozen=True, eq=False)
class GuessResults:
    """The outcome of :func:`guess_results`.

    Attributes:
        agreements: of each way of guessing with the truth, by the names of the ways.
        sizes: [Q, M] float64, L2 of the true changes, of pixels in [0, 1].
    """

    agreements: dict[str, Agreement]
    sizes: np.ndarray

    def summary(self) -> dict:
        """What is worth keeping, by names for people; NaN and None where correlations are not defined."""
        first = next(iter(self.agreements))
        return {
            "size of the true changes, L2": {"median": np.median(self.sizes), "largest": self.sizes.max()},
            "agreement": {
                name: {
                    "median Pearson": _quantile(found.pearson, 0.5),
                    "median Spearman": _quantile(found.spearman, 0.5),
                    "Pearson quartiles": _quantile(found.pearson, [0.25, 0.75]),
                    "Spearman quartiles": _quantile(found.spearman, [0.25, 0.75]),
                }
                for name, found in self.agreements.items()
            },
            f"{first} against": self._tests(compare),
            f"{first} against, paired by sample": self._tests(compare_paired),
        }

    def _tests(self, test: Callable) -> dict:
        """Of the first way of guessing against each other one; None where either has no correlation that is defined."""
        first, *others = self.agreements

        def tested(name: str, kind: str):
            ours, theirs = (getattr(self.agreements[each], kind) for each in (first, name))
            defined = [~np.isnan(values.reshape(len(values), -1)).all(1) for values in (ours, theirs)]  # [Q] each
            return test(ours, theirs) if (defined[0] & defined[1]).any() else None

        return {name: {kind: tested(name, kind) for kind in ("pearson", "spearman")} for name in others}


def guess_results(samples: Tensor, true: Tensor, guesses: Mapping[str, Tensor]) -> GuessResults:
    """How well ways of guessing counterfactuals agree with the true ones.

    Args:
        samples: [Q, C, H, W] in [-1, 1].
        true: counterfactuals by ablation, [Q, M, C, H, W].
        guesses: [Q, M, C, H, W] by each way's name; the others are compared with the first.

    Returns:
        :class:`GuessResults`.

    Raises:
        ValueError: the shapes do not go together.

    Extra memory: see :func:`~pyattr.evaluation.agreement`.

    Source: Dai, Gifford 2023, figure 5.
    """
    agreements = {name: agreement(samples, true, guess) for name, guess in guesses.items()}
    return GuessResults(agreements, change_sizes(samples, true))


@dataclass(frozen=True, eq=False)
class Quality:
    """Fréchet distances to the training images.

    Attributes:
        ensemble: that of its samples.
        members: of each member's own, from the same noise.
    """

    ensemble: Distance
    members: list[Distance]

    def summary(self) -> dict:
        """What is worth keeping, under the name that the features deserve."""
        return {self.ensemble.name: {"ensemble": self.ensemble.value, "members": [each.value for each in self.members]}}


def quality(samples: Tensor, alone: Tensor, images, extractor: Extractor) -> Quality:
    """How near the samples of an ensemble and of its members come to the training images.

    Args:
        samples: [Q, C, H, W], Q at least 2.
        alone: [Q, n, C, H, W], of each member alone.
        images: [N, C, H, W], those that the ensemble was trained on.
        extractor: see :func:`~pyattr.evaluation.fid`.

    Raises:
        ValueError: see :func:`~pyattr.evaluation.fid`.
    """
    ensemble, *members = fids((samples, *alone.unbind(1)), images, extractor)
    return Quality(ensemble, members)


def convergence_summary(settling: Convergence) -> dict:
    """Mean distances over samples, by the number of members."""
    return {
        "members": list(range(1, settling.to_full.shape[1] + 1)),
        "to the full ensemble": settling.to_full.mean(0),
        "to the next": settling.successive.mean(0),
    }


def random_items(count: int, wanted: int, seed: int = 0) -> np.ndarray:
    """``wanted`` of ``count`` items, drawn without return: rising indices, int64."""
    return np.sort(np.random.RandomState(seed).permutation(count)[:wanted])


def _quantile(values: np.ndarray, at) -> np.ndarray:
    """Of the numbers that are not NaN; NaN where there are none."""
    values = values[~np.isnan(values)]
    return np.quantile(values, at) if len(values) else np.full(np.shape(at), np.nan)
