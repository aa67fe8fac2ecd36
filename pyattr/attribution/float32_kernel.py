"""The damped inverse kernel in the arithmetic of the published code, to show what that arithmetic does.

``(Phi^T Phi + lambda I)^{-1}`` is inverted by :func:`torch.linalg.inv` in float32, D x D whatever N is. With N < D that matrix
has eigenvalues lambda beside ones that may be 10^6 times as large or more, which float32 does not resolve: below a lambda that
depends on the features, scores are the noise of the inversion. The equal N x N form would be another arithmetic with another
noise, so it is not used here.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .kernel import DampedKernel
from .products import divided


class Float32Kernel(DampedKernel):
    """As :class:`DampedKernel`, but that scores come from float32 inverses; for reproduction alone.

    Args, attributes: as there; ``eigenvalues`` are still those in float64.

    Extra memory: that of :class:`DampedKernel`, the features in float32, and 12 D^2 bytes.
    """

    def __init__(self, features, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._phi = features.tensor().to(self.device, torch.float32)  # [N, D]

    def grid(self, queries: Tensor, lambdas: Iterable[float], divisors: Tensor | None = None) -> Iterator[Tensor]:
        """As :meth:`DampedKernel.grid`, one inversion for each lambda; NaN where the library finds the matrix singular."""
        queries = queries.to(self.device, torch.float32)
        for number, lambda_ in enumerate(lambdas):
            scores = queries @ self._inverse(lambda_) @ self._phi.T
            if divisors is not None:
                scores = divided(scores.double(), divisors[number]).float()
            yield scores.cpu()

    def solution_norms(self, lambdas: Sequence[float]) -> Tensor:
        """As :meth:`DampedKernel.solution_norms`, with an inversion for each lambda."""
        norms = [torch.linalg.vector_norm(self._phi @ self._inverse(value), dim=1) for value in lambdas]
        return torch.stack(norms).double()

    def leverages(self, lambda_: float) -> Tensor:
        """As :meth:`DampedKernel.leverages`, with an inversion."""
        return torch.linalg.vecdot(self._phi @ self._inverse(lambda_), self._phi).double()

    def _inverse(self, lambda_: float) -> Tensor:  # [D, D]
        gram = self._phi.T @ self._phi
        gram.diagonal().add_(lambda_)
        inverse, failed = torch.linalg.inv_ex(gram)
        return inverse.fill_(torch.nan) if int(failed) else inverse
