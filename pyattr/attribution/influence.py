"""TRAK's scores relative to how far a training image moves the model, or to how large its gradient is."""

from torch import Tensor

from .products import row_norms
from .trak import TRAK


class RelativeInfluence(TRAK):
    """Which training images lower a query's loss most for how far they move the model.

    ``tau(q, n) = phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n / ||(Phi^T Phi + lambda I)^{-1} phi_n||``: a bound on the step in
    parameters that a training image may take, which keeps outliers with large gradients from leading every list.

    Sign, lambda, arguments, attributes and errors: as in :class:`TRAK`; divisors are positive. Where a training image has no
    gradient its scores are 0.

    Source: Barshan, Brunet, Dziugaite, "RelatIF: Identifying Explanatory Training Samples via Relative Influence", AISTATS
    2020; on TRAK's features as in Zheng et al., ICLR 2024 (D-TRAK).
    """

    def _divisors(self, lambdas: list[float]) -> Tensor:
        return self._kernel.solution_norms(lambdas)


class RenormalizedInfluence(TRAK):
    """Which training images lower a query's loss most for how large their gradient is.

    ``tau(q, n) = phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n / ||phi_n||``.

    Sign, lambda, arguments, attributes and errors: as in :class:`TRAK`; divisors are positive. Where a training image has no
    gradient its scores are 0.

    Source: Hammoudeh, Lowd, "Identifying a Training-Set Attack's Target Using Renormalized Influence Estimation", CCS 2022;
    on TRAK's features as in Zheng et al., ICLR 2024 (D-TRAK).
    """

    def _divisors(self, lambdas: list[float]) -> Tensor:
        return row_norms(self._train[0], self.device).expand(len(lambdas), -1)
