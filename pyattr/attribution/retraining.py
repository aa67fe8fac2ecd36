"""Scores from retraining alone: what a pool of models trained on random subsets says of each training image.

No gradient and no approximation, but a model for each subset. The pool must not be the ground truth that scores are then
judged by (:func:`pyattr.evaluation.subsets` draws the two apart), since these methods would be told the answer.
"""

import numpy as np
import torch
from torch import Tensor

from ..evaluation.ground_truth import GroundTruth

_FOLDS = 5
_ALPHAS = (0.1, 1.0, 10.0)


class _Retraining:
    """A method that reads the outputs of a pool.

    Args:
        pool: losses under models trained on subsets.
        target: which of its functions of the loss.

    Raises:
        ValueError: the pool has no such target function.
    """

    signed = True

    def __init__(self, pool: GroundTruth, *, target: str = "simple"):
        self.pool, self.target = pool, target
        self._outputs = pool.outputs(target)  # [M, Q]
        self._fitted = False

    def fit(self, train) -> "_Retraining":
        """Compare the training images with those of the pool, and what the pool can tell of them.

        Args:
            train: [N, C, H, W], those of the pool in their order and dtype.

        Returns:
            self.

        Raises:
            ValueError: they are others, or the pool is too small.
        """
        self.pool.check_images(train, type(self).__name__)
        self._check_masks(self.pool.masks)
        self._fitted = True
        return self

    def scores(self, queries) -> Tensor:
        """Scores of all training images for each query; positive = proponent.

        Args:
            queries: some of the pool's, [Q', C, H, W] in the dtype they had, or :class:`~pyattr.diffusion.Samples`.

        Returns:
            [Q', N] float32, computed in float64; NaN where an output is NaN.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: a query is not in the pool.

        Extra memory: 8 Q' N bytes.
        """
        name = type(self).__name__
        if not self._fitted:
            raise RuntimeError(f"{name}: fit must be called before scores")
        outputs = self._outputs[:, self.pool.rows(queries, name)]  # [M, Q']
        return torch.from_numpy(self._scores(self.pool.masks.astype(np.float64), outputs).astype(np.float32))

    def _check_masks(self, masks: np.ndarray) -> None:
        raise NotImplementedError

    def _scores(self, masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:  # [M, N], [M, Q'] -> [Q', N]
        raise NotImplementedError


class EmpiricalInfluence(_Retraining):
    """By how much lower the query's loss is on average under the models that saw an image than under the others.

    ``tau(q, n) = mean over m without n of F[m, q] - mean over m with n of F[m, q]``

    Sign: F is a loss, so the published difference (with minus without) is negative where the image helps; it is negated here.
    For subsets that each hold half of the images independently, tau is an unbiased estimate of the effect of n averaged over
    the other images, with variance about 4 Var(F) / M.

    Args:
        pool, target: see :func:`pyattr.evaluation.build_ground_truth`, with subsets of ``pool="retraining"``.

    Source: Feldman, Zhang, "What Neural Networks Memorize and Why", NeurIPS 2020; for diffusion models Zheng et al., ICLR 2024
    (D-TRAK), appendix.
    """

    def _check_masks(self, masks: np.ndarray) -> None:
        seen = masks.sum(0)
        lacking = np.flatnonzero((seen == 0) | (seen == len(masks)))
        if len(lacking):
            raise ValueError(
                f"EmpiricalInfluence: pool must have models with and without each image, got none "
                f"{'with' if seen[lacking[0]] == 0 else 'without'} image {lacking[0]}"
            )

    def _scores(self, masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        outputs = outputs - outputs.mean(0)  # the difference does not change, but for its rounding
        seen = masks.sum(0)  # [N]
        return outputs.T @ ((1 - masks) / (len(masks) - seen) - masks / seen)


class Datamodel(_Retraining):
    """The weights of a linear model, fitted for each query, of its loss on which images were trained on.

    ``F[m, q] = b_q - sum_n tau(q, n) masks[m, n]`` by ridge regression, with the penalty among 0.1, 1 and 10 that explains most
    variance in five-fold cross-validation.

    Sign: F is a loss, so the published coefficient is negative where the image helps; it is negated here.

    Args:
        pool, target: see :func:`pyattr.evaluation.build_ground_truth`, with subsets of ``pool="retraining"``.

    Raises:
        ImportError: scikit-learn is missing: install pyattr[evaluation].

    Source: Ilyas et al., "Datamodels", ICML 2022; with ridge regression as in the published code of Zheng et al., ICLR 2024
    (D-TRAK).
    """

    def __init__(self, pool: GroundTruth, *, target: str = "simple"):
        super().__init__(pool, target=target)
        try:
            from sklearn.linear_model import RidgeCV
        except ImportError:
            raise ImportError("Datamodel: scikit-learn is missing: install pyattr[evaluation]") from None
        self._ridge = RidgeCV

    def _check_masks(self, masks: np.ndarray) -> None:
        if len(masks) < 2 * _FOLDS:
            raise ValueError(
                f"Datamodel: pool must hold at least {2 * _FOLDS} subsets, two for each fold, got {len(masks)}"
            )

    def _scores(self, masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        found = np.full((outputs.shape[1], masks.shape[1]), np.nan)
        for q in np.flatnonzero(np.isfinite(outputs).all(0)):
            found[q] = -self._ridge(alphas=_ALPHAS, cv=_FOLDS).fit(masks, outputs[:, q]).coef_
        return found
