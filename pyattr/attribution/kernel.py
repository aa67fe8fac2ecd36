"""The damped inverse kernel that TRAK and D-TRAK share: ``phi_q^T (G + lambda I)^{-1} phi_n`` with ``G = Phi^T Phi``.

Two forms give the same numbers. Primal, for N >= D: G is D x D. Dual, for N < D:
``Phi_q (Phi^T Phi + lambda I)^{-1} Phi^T = (Phi_q Phi^T) (Phi Phi^T + lambda I)^{-1}``, where the matrix is N x N. Either is
symmetric, so one eigendecomposition serves every lambda. All of it is float64: with N < D the matrix G is singular, and its
largest eigenvalue may exceed a useful lambda by 10^6, which float32 cannot resolve.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.features import Features

# Of the eigenvalues that the automatic lambda leaves as effective dimension; docs/attribution.md has the reasons.
FRACTION = 0.25
_COLUMNS = 2048  # of the features that are in float64 at a time


class DampedKernel:
    """Features of the training samples, ready to be weighed against any query at any lambda.

    Args:
        features: Phi, N rows of D.
        device: where the linear algebra runs.

    Attributes:
        eigenvalues: the min(N, D) largest of G, falling, none below 0; [min(N, D)] float64.

    Raises:
        ValueError: a feature is not finite.

    Extra memory: about 40 min(N, D)^2 bytes during the decomposition (the matrix, its eigenvectors and the library's
    workspace) and 8 min(N, D)^2 afterwards; in the dual form the features in float32 and 16 N KiB besides, in the primal form
    one block of the features in float64.
    """

    def __init__(self, features: Features, device: torch.device | str = "cpu"):
        self.features, self.device = features, torch.device(device)
        self.dual = len(features) < features.dim
        gram = self._dual_gram() if self.dual else self._primal_gram()
        if not torch.isfinite(gram).all():
            raise ValueError("attribution: the features of the training images hold values that are not finite")
        values, vectors = torch.linalg.eigh(gram)
        del gram
        self.eigenvalues = values.flip(0).clamp(min=0)  # [M], M = min(N, D)
        self.vectors = vectors.flip(1)  # [M, M], a column for each eigenvalue

    def _dual_gram(self) -> Tensor:  # [N, N]
        self.rows = self.features.tensor().to(self.device)  # [N, D]
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device=self.device)
        for columns in self.rows.split(_COLUMNS, 1):
            columns = columns.to(torch.float64)
            gram.addmm_(columns, columns.T)
        return gram

    def _primal_gram(self) -> Tensor:  # [D, D]
        dim = self.features.dim
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        for _, rows in self.features.blocks():
            rows = rows.to(self.device, torch.float64)
            gram.addmm_(rows.T, rows)
        return gram

    def scores(self, queries: Tensor, lambda_: float) -> Tensor:
        """``Phi_q (G + lambda I)^{-1} Phi^T``.

        Args:
            queries: Phi_q, [Q, D].
            lambda_: positive, in the units of G's eigenvalues.

        Returns:
            [Q, N] float32 on the CPU.

        Extra memory: 8 Q (D + 2 max(N, D)) bytes.
        """
        queries = queries.to(self.device, torch.float64)
        if self.dual:
            cross = torch.zeros(len(queries), len(self.rows), dtype=torch.float64, device=self.device)  # [Q, N]
            for ours, theirs in zip(queries.split(_COLUMNS, 1), self.rows.split(_COLUMNS, 1), strict=True):
                cross.addmm_(ours, theirs.to(torch.float64).T)
            return self._damped(cross, lambda_).to("cpu", torch.float32)
        weighed = self._damped(queries, lambda_)  # [Q, D]
        out = torch.empty(len(queries), len(self.features), dtype=torch.float32, device="cpu")
        for start, rows in self.features.blocks():
            out[:, start : start + len(rows)] = weighed @ rows.to(self.device, torch.float64).T
        return out

    def _damped(self, left: Tensor, lambda_: float) -> Tensor:  # [Q, M] -> [Q, M]
        """``left (matrix + lambda I)^{-1}``."""
        return (left @ self.vectors / (self.eigenvalues + lambda_)) @ self.vectors.T


def effective_dimension(eigenvalues: Tensor, lambda_: float) -> float:
    """``sum_i w_i / (w_i + lambda)``: the sum over training samples of their leverage ``phi_n^T (G + lambda I)^{-1} phi_n``."""
    return float((eigenvalues / (eigenvalues + lambda_)).sum())


def balanced_lambda(eigenvalues: Tensor) -> float:
    """The lambda at which the effective dimension is a quarter of the number of eigenvalues above rounding.

    Args:
        eigenvalues: [M] float64, not negative.

    Returns:
        lambda, in the units of the eigenvalues.

    Raises:
        ValueError: no eigenvalue is positive.
    """
    largest = float(eigenvalues.max())
    if not largest > 0:
        raise ValueError("attribution: every feature of the training images is zero, so nothing can be attributed")
    positive = eigenvalues[eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * largest]
    # w / (w + lambda) = FRACTION where lambda = w (1 / FRACTION - 1). At the lambda of the smallest w all terms are at least
    # that, at the lambda of the largest at most, and the sum falls as lambda grows: the answer lies between.
    spread = math.log(1 / FRACTION - 1)
    low, high = math.log(float(positive.min())) + spread, math.log(largest) + spread
    for _ in range(100):
        middle = (low + high) / 2
        if effective_dimension(positive, math.exp(middle)) > FRACTION * len(positive):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def choose_lambda(eigenvalues: Tensor, lambda_: float | Sequence[float] | None) -> float:
    """The lambda to use: the one given, the automatic one, or the grid's nearest to it on a logarithmic scale."""
    if isinstance(lambda_, (int, float)):
        return float(lambda_)
    balanced = balanced_lambda(eigenvalues)
    if lambda_ is None:
        return balanced
    return float(min(lambda_, key=lambda value: abs(math.log(value / balanced))))
