"""DAS: which training images change what the model predicts for a query, in whatever direction."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..diffusion.conditioned import Examples, as_examples, check_conditions
from ..diffusion.images import evaluating
from ..diffusion.schedule import Schedule
from .trak import TRAK


class DAS(TRAK):
    """Which training images change a query's predicted noise most, read off one number of the prediction.

    The aim is the change of the prediction itself, ``E_{t, eps} ||e_theta(x_q, t) - e_{theta without n}(x_q, t)||^2``. For a
    model that is linear in theta and a scalar prediction e with gradient phi and residual r = e - eps, leaving n out of least
    squares changes e(q) by exactly (Sherman, Morrison)

        phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n  r_n / (1 - h_n),        h_n = phi_n^T (Phi^T Phi + lambda I)^{-1} phi_n.

    A noise prediction has D numbers. This method puts one in their place, ``feature``: their mean, or ("l1") the sum of their
    magnitudes; averages its gradient over timesteps, each divided by its norm; and squares:

        tau(q, n) = (phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n  w_n)^2,    w_n = r_n / (1 - h_n), or without its factors.

    That is the method as it is evaluated in public; :class:`~pyattr.attribution.ProbedDAS` keeps all D numbers.

    - ``residuals``: r_n is the root of image n's mean squared error over its timesteps and noise, one forward pass for each.
      The published code weighs by errors that are first normalised over the timesteps of each image, which leaves them nearly
      equal; it leaves them out of the scores reported since.
    - ``leverage``: 1 / (1 - h_n), from the same eigendecomposition, at the lambda of the scores; refused at a lambda so small
      that the smallest eigenvalues are rounding (:meth:`~pyattr.attribution.kernel.DampedKernel.remainders`).

    Sign: the square says how much an image changes the prediction, not whether for the better; there are no opponents.
    ``squared=False`` is the number before the square, positive for an image whose gradient points the query's way, a
    proponent as in D-TRAK. A size may predict the losses of retrained models better and is no list of what to
    remove; :class:`~pyattr.attribution.Readout` squares any method.

    lambda is in the units of ``Phi^T Phi``: of D times gradients of norm 1, where they are normalised.

    Args:
        model, schedule: see :class:`~pyattr.attribution.gradient_method.GradientMethod`.
        squared: whether scores are squared: what comes out otherwise, squared in float32.
        residuals, leverage: see above.
        normalize: see :class:`~pyattr.diffusion.features.FeatureMap`; as published.
        features: as :class:`TRAK`'s, lambda_ and solve_dtype included.

    Attributes:
        signed: whether negative scores mean opponents: not where they are squared.
        lambda_, eigenvalues: see :class:`TRAK`.

    Raises:
        ValueError: an argument is not as above.

    Source: Lin, Tao, Dong, Xu, "Diffusion Attribution Score: Evaluating Training Data Influence in Diffusion Models",
    ICLR 2025, and its code, whose ``mean`` readout this is.
    """

    default_feature = "avg"

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        squared: bool = True,
        residuals: bool = False,
        leverage: bool = False,
        normalize: bool = True,
        **features,
    ):
        super().__init__(model, schedule, normalize=normalize, **features)
        self.squared, self.leverage, self.residuals = squared, leverage, residuals
        self._errors: Tensor | None = None  # [N] float64, the root of each training image's mean squared error

    @property
    def signed(self) -> bool:
        """Whether negative scores mean opponents."""
        return not self.squared

    def fit(self, train) -> "DAS":
        """As :meth:`TRAK.fit`; with ``residuals`` the losses of the training images are computed too, and kept in memory."""
        train = as_examples(train, type(self).__name__, "train")
        check_conditions(self.model, train, type(self).__name__, "train")
        errors = self._residuals(train) if self.residuals and len(train) else None
        super().fit(train)
        self._errors = errors
        return self

    def scores(self, queries, *, lambda_: float | None = None, ids=None) -> Tensor:
        """How much each training image changes the prediction for each query; without the square, positive = proponent.

        Args, returns, errors, memory: see :meth:`TRAK.scores`; and the scores once more in float64.
        """
        return super().scores(queries, lambda_=lambda_, ids=ids)

    def _grid(self, queries, lambdas: Iterable[float | None], ids) -> Iterator[tuple[float, Tensor]]:
        found = super()._grid(queries, lambdas, ids)
        return ((lambda_, self._read(scores, lambda_)) for lambda_, scores in found)

    def _read(self, scores: Tensor, lambda_: float) -> Tensor:  # [Q, N] -> [Q, N]
        values = scores.double()
        if self.residuals:
            values *= self._errors
        if self.leverage:
            values /= self._kernel.remainders(lambda_).cpu()
        rounded = values.float()
        return rounded.square_() if self.squared else rounded

    def _residuals(self, train: Examples) -> Tensor:  # [N]
        parts = []
        with evaluating(self.model):
            for ids in torch.arange(len(train)).split(self.batch_size):
                loss = self.feature_map.mean_loss(
                    self.model, train[ids], ids, timesteps_per_pass=self.timesteps_per_pass
                )
                parts.append(loss.sqrt())
                self.progress(int(ids[-1]) + 1, len(train), "residuals")
        return torch.cat(parts)
