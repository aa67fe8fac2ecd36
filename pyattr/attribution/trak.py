"""TRAK on a diffusion model: projected gradients of the training loss, weighed by a damped inverse kernel."""

import math
from collections.abc import Iterable, Iterator
from numbers import Real

import torch
from torch import Tensor, nn

from ..diffusion.features import Features
from ..diffusion.schedule import Schedule
from .float32_kernel import Float32Kernel
from .gradient_method import GradientMethod
from .kernel import DampedKernel, choose_lambda


class TRAK(GradientMethod):
    """Which training images lower the loss of a query, by one Newton step in a random projection of the parameters.

    ``tau(q, n) = phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n``, with phi the projected gradient of the feature function
    averaged over timesteps (:class:`~pyattr.diffusion.features.FeatureMap`) and Phi those of the training images.

    Sign: with f the training loss, leaving image n out moves the minimiser by +H^{-1} grad f_n to first order, which changes
    the query's loss by grad f_q^T H^{-1} grad f_n. So the raw number is positive where leaving n out raises the query's loss:
    a proponent. No conversion is needed.

    lambda is in the units of the unnormalised projected Gram matrix ``Phi^T Phi``: its published values for D = 32768 and
    10 timesteps lie between 10 and 5000. Sums over training images, not means, so it grows with D and with the scale of f.
    Where none is given it is the one at which the effective dimension sum_i w_i / (w_i + lambda), w the eigenvalues, is a
    quarter of their number: ``docs/attribution.md`` says why, and what that choice does not know.

    Args:
        model, schedule: see :class:`~pyattr.attribution.gradient_method.GradientMethod`.
        lambda_: positive; or a grid, whose member nearest to the automatic choice is taken; None for that choice itself.
        solve_dtype: torch.float64; or torch.float32 for the inverse as the published code takes it, for reproduction alone: at
            small lambda those scores are noise (:class:`~pyattr.attribution.float32_kernel.Float32Kernel`).
        features: proj_dim, num_timesteps, strategy, feature, num_noises, query_noises, kind, seed, noise_seed, normalize,
            batch_size, timesteps_per_pass, memory, directory and progress of
            :class:`~pyattr.attribution.gradient_method.GradientMethod`. Progress has a stage "eigendecomposition" besides.

    Attributes:
        lambda_: the one in use, after :meth:`fit`.
        eigenvalues: of the Gram matrix, falling, after :meth:`fit`.
        signed: True: negative scores mean opponents.

    Raises:
        ValueError: an argument is not as above.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, section 3, with one model and Q = I; its form
    for diffusion models, Zheng et al., ICLR 2024 (D-TRAK), section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        lambda_: float | Iterable[float] | None = None,
        solve_dtype: torch.dtype = torch.float64,
        **features,
    ):
        super().__init__(model, schedule, **features)
        if solve_dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self).__name__}: solve_dtype must be torch.float32 or torch.float64, got {solve_dtype}"
            )
        self.solve_dtype = solve_dtype
        self._asked_lambda = None if lambda_ is None else self._lambdas(lambda_)

    def _prepare(self, found: list[Features]) -> None:
        self.progress(0, 1, "eigendecomposition")
        kernel = DampedKernel if self.solve_dtype == torch.float64 else Float32Kernel
        self._kernel = kernel(found[0], self.device)
        self._choose_lambda()
        self.progress(1, 1, "eigendecomposition")

    def _choose_lambda(self) -> None:
        self.eigenvalues = self._kernel.eigenvalues
        self.lambda_ = choose_lambda(self.eigenvalues, self._asked_lambda)

    def scores(self, queries, *, lambda_: float | None = None, ids=None) -> Tensor:
        """Scores of all training images for each query; positive = proponent.

        The features of the last queries are kept, so that asking again with another lambda is cheap.

        Args:
            queries: images [Q, C, H, W] (uint8, or floating point in [-1, 1]) or :class:`~pyattr.diffusion.Samples`.
            lambda_: in place of the one chosen by :meth:`fit`.
            ids: [Q] distinct noise ids. None: 2^40 + i for the i-th query, or 2^40 + its id for a sample, so that no query
                shares its noise with a training image.

        Returns:
            [Q, N] float32.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: an argument is not as above, or the model has changed since :meth:`fit`.

        Extra memory: the queries' features, and :meth:`~pyattr.attribution.kernel.DampedKernel.grid`'s.
        """
        if lambda_ is not None:
            lambda_ = self._lambdas(lambda_)
            if isinstance(lambda_, list):
                raise ValueError(f"{type(self).__name__}: lambda_ must be one number here, got {len(lambda_)}")
        ((_, scores),) = self._grid(queries, [lambda_], ids)
        return scores

    def scores_grid(self, queries, lambdas: Iterable[float], *, ids=None) -> Iterator[tuple[float, Tensor]]:
        """:meth:`scores` for one lambda after the other, from the one decomposition, with the queries' share of it done once.

        Args:
            queries, ids: see :meth:`scores`.
            lambdas: positive.

        Returns:
            An iterator over (lambda, [Q, N] float32), the bits of :meth:`scores`; a matrix is computed as it is asked for.

        Raises:
            RuntimeError, ValueError: as :meth:`scores`, before the first is asked for.
        """
        lambdas = self._lambdas(lambdas)
        return self._grid(queries, lambdas if isinstance(lambdas, list) else [lambdas], ids)

    def _grid(self, queries, lambdas: list[float | None], ids) -> Iterator[tuple[float, Tensor]]:
        (found,) = self._query_features(queries, ids)
        lambdas = [self.lambda_ if value is None else value for value in lambdas]
        return zip(lambdas, self._kernel.grid(found.tensor(), lambdas, self._divisors(lambdas)), strict=True)

    def _divisors(self, lambdas: list[float]) -> Tensor | None:
        """What columns of scores are divided by, [L, N] float64; None for nothing."""
        return None

    def _lambdas(self, given) -> float | list[float]:
        """A number of any library as a float, a grid as a list of them."""
        single = isinstance(given, Real) or getattr(given, "ndim", 1) == 0
        values = [float(value) for value in ([given] if single else given)]
        if not values:
            raise ValueError(f"{type(self).__name__}: lambda_ must be a number or a grid of some, got an empty grid")
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"{type(self).__name__}: lambda_ must be positive and finite, got {value}")
        return values[0] if single else values
