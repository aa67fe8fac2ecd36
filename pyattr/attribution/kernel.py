"""The damped inverse kernel that TRAK and D-TRAK share: ``phi_q^T (G + lambda I)^{-1} phi_n`` with ``G = Phi^T Phi``.

Two forms give the same numbers. Primal, for N >= D: G is D x D. Dual, for N < D:
``Phi_q (Phi^T Phi + lambda I)^{-1} Phi^T = (Phi_q Phi^T) (Phi Phi^T + lambda I)^{-1}``, where the matrix is N x N. Either is
symmetric, so one eigendecomposition serves every lambda. All of it is float64: with N < D the matrix G is singular, and its
largest eigenvalue may exceed a useful lambda by 10^6, which float32 cannot resolve.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..diffusion.features import Features
from .products import blocks, divided

# Of the eigenvalues that the automatic lambda leaves as effective dimension; docs/attribution.md has the reasons.
FRACTION = 0.25
_COLUMNS = 2048  # of the features that are in float64 at a time
_QUERIES = 256  # that are weighed at a time


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
        for _, rows in blocks(self.features, self.device):
            gram.addmm_(rows.T, rows)
        return gram

    def scores(self, queries: Tensor, lambda_: float) -> Tensor:
        """``Phi_q (G + lambda I)^{-1} Phi^T``; see :meth:`grid`."""
        return next(self.grid(queries, [lambda_]))

    def grid(self, queries: Tensor, lambdas: Iterable[float], divisors: Tensor | None = None) -> Iterator[Tensor]:
        """``Phi_q (G + lambda I)^{-1} Phi^T`` for one lambda after the other; what does not depend on it is done once.

        Args:
            queries: Phi_q, [Q, D].
            lambdas: L of them, positive, in the units of G's eigenvalues.
            divisors: of the columns, [L, N] float64 on the kernel's device; a column is 0 where its divisor is.

        Yields:
            [Q, N] float32 on the CPU, rounded once from float64.

        Extra memory: 16 Q min(N, D) bytes, and 2048 (D + 2 max(N, D)) bytes.
        """
        left = [self._in_eigenvectors(part) for part in queries.split(_QUERIES)]  # [R, M] each
        for number, lambda_ in enumerate(lambdas):
            out = torch.empty(len(queries), len(self.features), dtype=torch.float32, device="cpu")
            weighed = [part / (self.eigenvalues + lambda_) @ self.vectors.T for part in left]  # [R, M] each
            for columns, right in self._right():
                for into, part in zip(out.split(_QUERIES), weighed, strict=True):
                    scores = part if right is None else part @ right.T
                    if divisors is not None:
                        scores = divided(scores, divisors[number, columns])
                    into[:, columns] = scores.to("cpu", torch.float32)
            yield out

    def solution_norms(self, lambdas: Sequence[float]) -> Tensor:
        """``||(G + lambda I)^{-1} phi_n||`` for each lambda, [L, N] float64 on the kernel's device.

        Extra memory: 2048 (D + min(N, D)) bytes.
        """
        damped = self.eigenvalues[:, None] + torch.tensor(lambdas, dtype=torch.float64, device=self.device)  # [M, L]
        if self.dual:
            # (Phi^T Phi + lambda I)^{-1} Phi^T = Phi^T (Phi Phi^T + lambda I)^{-1}: column n has the squared norm
            # e_n^T A^{-1} K A^{-1} e_n, with K = U diag(w) U^T and A = K + lambda I.
            squares = [rows.square() @ (self.eigenvalues[:, None] / damped**2) for rows in self.vectors.split(_QUERIES)]
        else:
            squares = [(rows @ self.vectors).square() @ damped**-2.0 for _, rows in blocks(self.features, self.device)]
        return torch.cat(squares).sqrt().T

    def remainders(self, lambda_: float) -> Tensor:
        """``1 - h_n`` with the leverage ``h_n = phi_n^T (G + lambda I)^{-1} phi_n``, the share of a sample's fit due to itself.

        In the dual form by ``1 - h_n = sum_i u_{ni}^2 lambda / (w_i + lambda)``, where nothing cancels though h_n is near 1, as
        all of them are at small lambda. In the primal form h_n is taken from 1, and what rounding leaves is raised to
        ``lambda / (||phi_n||^2 + lambda)``, below which 1 - h_n never lies.

        Returns:
            [N] float64 on the kernel's device, in (0, 1]; the sum of h_n is the effective dimension. The relative error in the
            dual form, the absolute one in the primal, is at most about M eps w_1 / (w_M + lambda), M = min(N, D), eps = 2^-52:
            eigenvalues are known up to M eps times the largest.

        Raises:
            ValueError: that bound is above 1.

        Extra memory: 2048 (D + 2 min(N, D)) bytes.
        """
        largest, smallest = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        resolved = len(self.eigenvalues) * torch.finfo(torch.float64).eps * largest
        if smallest + lambda_ < resolved:
            raise ValueError(
                f"attribution: lambda_ must be at least {resolved:.3g} for leverages, below which float64 does not tell the "
                f"smallest eigenvalues from rounding beside the largest, {largest:.3g}; got {lambda_:g}"
            )
        damped = self.eigenvalues + lambda_  # [M]
        if self.dual:  # I - Phi (Phi^T Phi + lambda I)^{-1} Phi^T = lambda (K + lambda I)^{-1}
            return torch.cat([rows.square() @ (lambda_ / damped) for rows in self.vectors.split(_QUERIES)])
        parts = []
        for _, rows in blocks(self.features, self.device):
            left = 1 - (rows @ self.vectors).square() @ (1 / damped)
            parts.append(torch.maximum(left, lambda_ / (rows.square().sum(1) + lambda_)))
        return torch.cat(parts)

    def _in_eigenvectors(self, queries: Tensor) -> Tensor:  # [R, D] -> [R, M]
        """The queries, in the dual form their products with the training samples, in the basis of the eigenvectors."""
        if not self.dual:
            return queries.to(self.device, torch.float64) @ self.vectors
        cross = torch.zeros(len(queries), len(self.rows), dtype=torch.float64, device=self.device)  # [R, N]
        for ours, theirs in zip(queries.split(_COLUMNS, 1), self.rows.split(_COLUMNS, 1), strict=True):
            cross.addmm_(ours.to(self.device, torch.float64), theirs.to(torch.float64).T)
        return cross @ self.vectors

    def _right(self) -> Iterator[tuple[slice, Tensor | None]]:
        """What stands to the right of the inverse: in the primal form the training samples, in the dual form nothing."""
        if self.dual:
            yield slice(None), None
        else:
            yield from blocks(self.features, self.device)


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
