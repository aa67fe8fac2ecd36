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

    The features of the training samples are read anew, a block at a time, for the matrix of a lambda and for its scores. Where
    their blocks end is where float32 sums are split: of features in memory there is one block, and the arithmetic that of the
    published expression.

    Extra memory: that of :class:`DampedKernel`, one block of the features in float32, and 12 D^2 bytes.
    """

    def grid(self, queries: Tensor, lambdas: Iterable[float], divisors: Tensor | None = None) -> Iterator[Tensor]:
        """As :meth:`DampedKernel.grid`, one inversion for each lambda; NaN where the library finds the matrix singular."""
        queries = queries.to(self.device, torch.float32)
        for number, lambda_ in enumerate(lambdas):
            out = torch.empty(len(queries), len(self.features), dtype=torch.float32, device="cpu")
            weighed = queries @ self._inverse(lambda_)
            for columns, rows in self._blocks():
                scores = weighed @ rows.T
                if divisors is not None:
                    scores = divided(scores.double(), divisors[number, columns]).float()
                out[:, columns] = scores.cpu()
            yield out

    def solution_norms(self, lambdas: Sequence[float]) -> Tensor:
        """As :meth:`DampedKernel.solution_norms`, with an inversion for each lambda."""
        norms = []
        for value in lambdas:
            inverse = self._inverse(value)
            norms.append(torch.cat([torch.linalg.vector_norm(rows @ inverse, dim=1) for _, rows in self._blocks()]))
        return torch.stack(norms).double()

    def remainders(self, lambda_: float) -> Tensor:
        """As :meth:`DampedKernel.remainders`, with an inversion, and with what float32 leaves of 1 - h_n."""
        inverse = self._inverse(lambda_)
        return 1 - torch.cat([torch.linalg.vecdot(rows @ inverse, rows) for _, rows in self._blocks()]).double()

    def _inverse(self, lambda_: float) -> Tensor:  # [D, D]
        dim = self.features.dim
        gram = torch.zeros(dim, dim, dtype=torch.float32, device=self.device)
        for _, rows in self._blocks():
            gram += rows.T @ rows
        gram.diagonal().add_(lambda_)
        inverse, failed = torch.linalg.inv_ex(gram)
        return inverse.fill_(torch.nan) if int(failed) else inverse

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start, block in self.features.blocks():
            yield slice(start, start + len(block)), block.to(self.device, torch.float32)
