"""What retraining without the images that methods name did to samples, and how sure that is."""

import os
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..diffusion.storage import load_tensors, save_tensors
from .agreement import PairedComparison, compare_paired
from .distances import check_extractor
from .features import Extractor
from .lds import Interval
from .removal import RANDOM

_RESAMPLES, _RESAMPLING_SEED = 10_000, 42
_BLOCK = 1 << 22  # numbers in an array at a time


@dataclass(frozen=True, eq=False)
class Effects:
    """One measure of what was done to queries, by method.

    Attributes:
        name: of the measure.
        methods: A names, the last of them "random", the control.
        counts: R numbers of images.
        values: [A, R, Q] float64.
        level: of the intervals.
    """

    name: str
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    values: np.ndarray
    level: float = 0.95

    def of(self, method: str, count: int | None = None) -> np.ndarray:
        """The values of a method, [Q].

        Args:
            method: one of the names.
            count: one of the numbers; None where there is one alone.

        Raises:
            ValueError: there is no such method or number.
        """
        if method not in self.methods:
            raise ValueError(f"Effects: method must be one of {', '.join(self.methods)}, got {method!r}")
        if count is None and len(self.counts) == 1:
            count = self.counts[0]
        if count not in self.counts:
            raise ValueError(f"Effects: count must be one of {', '.join(map(str, self.counts))}, got {count}")
        return self.values[self.methods.index(method), self.counts.index(count)]

    def median(self, method: str, count: int | None = None) -> float:
        """Over the queries; NaN where one of them has none."""
        return float(np.median(self.of(method, count)))

    def interval(self, method: str, count: int | None = None) -> Interval:
        """Of the median, by percentiles of 10,000 resamples of the queries: what other queries might have given.

        The images that were made before and after are taken as they are, and so are the model and the training images.
        """
        values = self.of(method, count)
        rng = np.random.RandomState(_RESAMPLING_SEED)
        rows = max(1, _BLOCK // len(values))
        medians = np.concatenate(
            [
                np.median(values[rng.randint(0, len(values), (min(rows, _RESAMPLES - start), len(values)))], axis=1)
                for start in range(0, _RESAMPLES, rows)
            ]
        )
        tail = (1 - self.level) / 2
        return Interval(*np.quantile(medians, [tail, 1 - tail]).tolist())

    def compare(self, first: str, second: str = RANDOM, count: int | None = None) -> PairedComparison:
        """Whether one method's values tend to be other than another's, query by query: Wilcoxon's test, two-sided."""
        return compare_paired(self.of(first, count), self.of(second, count))


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """The outcome of :func:`~pyattr.evaluation.counterfactual`.

    Attributes:
        methods: A names, the last of them "random", the control.
        remove: R numbers of images that were taken away.
        ids: [Q] int64, of the queries.
        originals: [Q, C, H, W] float32, the samples as they were.
        images: [A, R, Q, C, H, W] float32, the same from models that never saw the removed images.
        targets: the F names of the functions of the loss.
        original_losses: [F, E, Q] float64, of the queries under the model that made them, for each draw of the noise.
        losses: [A, R, F, E, Q] float64, of the same queries under the other models.
        removed: [A, R, Q, N] bool.
        retrained: how many models were trained, fewer than A R Q where several were to lose the same images.
        settings: how.
    """

    methods: tuple[str, ...]
    remove: tuple[int, ...]
    ids: Tensor
    originals: Tensor
    images: Tensor
    targets: tuple[str, ...]
    original_losses: Tensor
    losses: Tensor
    removed: Tensor
    retrained: int
    settings: dict

    @property
    def l2(self) -> Effects:
        """Euclidean norm of the difference of the images, pixels in [-1, 1] (twice :func:`~pyattr.evaluation.l2`)."""
        differences = (self.images.double() - self.originals.double()).flatten(3)
        return self._effects("L2", differences.norm(dim=3).numpy())

    def cosine(self, extractor: Extractor, *, batch_size: int = 64) -> Effects:
        """Cosine of the angle between features of the images before and after; the smaller, the more was changed.

        Args:
            extractor: :func:`~pyattr.evaluation.clip` as published, or any other; the measure bears its name.

        Raises:
            TypeError: it is no extractor.
        """
        check_extractor("Counterfactuals", extractor)
        before = extractor(self.originals, batch_size=batch_size).double()  # [Q, D]
        after = extractor(self.images.flatten(0, 2), batch_size=batch_size).double()
        after = after.unflatten(0, self.images.shape[:3])  # [A, R, Q, D]
        inner = (before * after).sum(3)
        return self._effects(f"{extractor.name} cosine", (inner / (before.norm(dim=1) * after.norm(dim=3))).numpy())

    def loss_change(self, target: str = "simple") -> Effects:
        """Loss under the retrained model less that under the original one; positive: the removed images had helped.

        The mean over draws of the noise, which is the same before and after.

        Raises:
            ValueError: there is no such target.
        """
        if target not in self.targets:
            raise ValueError(f"Counterfactuals: target must be one of {', '.join(self.targets)}, got {target!r}")
        f = self.targets.index(target)
        changes = self.losses[:, :, f].mean(2) - self.original_losses[f].mean(0)
        return self._effects(f"change of the loss ({target})", changes.numpy())

    def _effects(self, name: str, values: np.ndarray) -> Effects:
        return Effects(name, self.methods, self.remove, values)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all.

        Extra memory: the tensors twice.
        """
        record = {name: getattr(self, name) for name in _RECORDED}
        save_tensors(path, {name: getattr(self, name) for name in _TENSORS}, {"kind": "counterfactuals", **record})

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Counterfactuals":
        """Read a file of :meth:`save` and check every byte of it.

        Raises:
            FileNotFoundError, pyattr.diffusion.DamagedFileError: there is none, or its bytes changed.
            ValueError: it is something else.
        """
        tensors, record = load_tensors(path)
        if record.pop("kind", None) != "counterfactuals":
            raise ValueError(f"Counterfactuals: {path} does not hold counterfactuals")
        listed = {name: tuple(record.pop(name)) for name in ("methods", "remove", "targets")}
        return cls(**tensors, **listed, **record)


_TENSORS = ("ids", "originals", "images", "original_losses", "losses", "removed")
_RECORDED = ("methods", "remove", "targets", "retrained", "settings")
