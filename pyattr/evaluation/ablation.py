"""What taking a class away does to a sample: the statistics of the class experiment of encoded ensembles."""

from dataclasses import dataclass

import numpy as np
import scipy.stats

from .agreement import Comparison, PairedComparison, compare, compare_paired
from .inputs import as_booleans, as_integers, as_numbers


@dataclass(frozen=True)
class Share:
    """How often something happened.

    Attributes:
        count, of: the numbers.
        low, high: Wilson's interval of 95%; NaN when nothing was counted.
    """

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """count / of; NaN for 0 / 0."""
        return self.count / self.of if self.of else float("nan")


def share(happened) -> Share:
    """The share of True in an array of booleans.

    Raises:
        TypeError: not booleans.
    """
    happened = as_booleans(happened, "share", "happened")
    count, of = int(happened.sum()), happened.size
    if not of:
        return Share(0, 0, float("nan"), float("nan"))
    interval = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
    return Share(count, of, float(interval.low), float(interval.high))


@dataclass(frozen=True, eq=False)
class ClassAblation:
    """The outcome of :func:`class_ablation`.

    Attributes:
        recovered: how often the ablation that changes a sample most is that of the sample's own class.
        confusion: [C, C] int64, samples by their class (rows) and by the class whose ablation changes them most (columns).
        own_flips: how often ablating its own class changes a sample's predicted class.
        other_flips: the same for the ablations of the other classes.
        own_distances, other_distances: [Q] and [Q (C - 1)] float64, how far the two kinds of ablation move a sample.
        distances: their comparison, which takes all distances for independent (see :func:`~pyattr.evaluation.compare`).
        paired: their comparison over samples, each one's own against the median of its others.
    """

    recovered: Share
    confusion: np.ndarray
    own_flips: Share
    other_flips: Share
    own_distances: np.ndarray
    other_distances: np.ndarray
    distances: Comparison
    paired: PairedComparison


def class_ablation(distances, classes, ablated_classes) -> ClassAblation:
    """Statistics of samples of which each class was ablated in turn.

    Args:
        distances: [Q, C] real: how far the ablation of class c moves sample q, in any measure.
        classes: [Q] integers in [0, C): the samples' predicted classes.
        ablated_classes: [Q, C] integers: the predicted class of sample q without class c; of any value, since a classifier may
            know classes that were never ablated.

    Returns:
        :class:`ClassAblation`. Of ablations at an equal distance, the first counts as the most influential.

    Raises:
        TypeError: distances are no real numbers, or classes no integers.
        ValueError: the shapes do not go together, a class is out of range, a distance is NaN, or there are no samples or fewer
            than two classes.

    Source: Dai, Gifford 2023, section 5.1.
    """
    distances = as_numbers(distances, "class_ablation", "distances")
    classes = as_integers(classes, "class_ablation", "classes")
    ablated_classes = as_integers(ablated_classes, "class_ablation", "ablated_classes")
    if distances.ndim != 2 or len(distances) == 0 or distances.shape[1] < 2:
        raise ValueError(
            "class_ablation: distances must have shape [Q, C] with at least one sample and two classes, "
            f"got {list(distances.shape)}"
        )
    if np.isnan(distances).any():
        raise ValueError("class_ablation: distances must not be NaN")
    samples, count = distances.shape
    if classes.shape != (samples,) or ablated_classes.shape != distances.shape:
        raise ValueError(
            f"class_ablation: classes must have shape [{samples}] and ablated_classes [{samples}, {count}], "
            f"got {list(classes.shape)} and {list(ablated_classes.shape)}"
        )
    if classes.min() < 0 or classes.max() >= count:
        raise ValueError(f"class_ablation: classes must lie in [0, {count}), got {classes.min()}..{classes.max()}")
    most = distances.argmax(1)  # [Q]
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (classes, most), 1)
    own = np.arange(count) == classes[:, None]  # [Q, C]
    flipped = ablated_classes != classes[:, None]
    return ClassAblation(
        recovered=share(most == classes),
        confusion=confusion,
        own_flips=share(flipped[own]),
        other_flips=share(flipped[~own]),
        own_distances=distances[own],
        other_distances=distances[~own],
        distances=compare(distances[own], distances[~own]),
        paired=compare_paired(distances[own], distances[~own].reshape(samples, count - 1)),
    )
