"""TRAK on a diffusion model: projected gradients of the training loss, weighed by a damped inverse kernel."""

import dataclasses
import math
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import features
from ..diffusion.checkpoint import identity
from ..diffusion.features import FeatureMap, Features
from ..diffusion.images import as_images, reference_parameter
from ..diffusion.losses import Loss
from ..diffusion.progress import Progress, silent
from ..diffusion.schedule import Schedule, check_schedule
from ..diffusion.storage import differences, tensors_hash
from .kernel import DampedKernel, choose_lambda
from .queries import query_ids, query_images


class TRAK:
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
        model: the trained network; ``model(x_t, t)`` predicts the noise.
        schedule: the one it was trained with.
        proj_dim: D.
        num_timesteps, strategy, num_noises, kind, noise_seed: see :class:`~pyattr.diffusion.features.FeatureMap`.
        query_noises: draws of the noise at each timestep of a query; None: ``num_noises``, as published. Queries are few,
            so more of them take their share of the noise off the scores at little cost.
        feature: f, a :class:`~pyattr.diffusion.Loss` or its name; None for the method's own.
        lambda_: positive; or a grid, whose member nearest to the automatic choice is taken; None for that choice itself.
        seed: of the projection.
        batch_size: images whose gradients are taken together.
        timesteps_per_pass: rows of one image that go through the model together, at most.
        memory: bytes that the gradients of a batch may take; see :meth:`~pyattr.diffusion.features.FeatureMap.batch`.
        directory: where features are kept as they are made and found again; None keeps them in memory.
        progress: stages "features", "eigendecomposition", "query features".

    Attributes:
        lambda_: the one in use, after :meth:`fit`.
        eigenvalues: of the Gram matrix, falling, after :meth:`fit`.
        signed: True: negative scores mean opponents.

    Raises:
        ValueError: an argument is not as above.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, section 3, with one model and Q = I; its form
    for diffusion models, Zheng et al., ICLR 2024 (D-TRAK), section 3.
    """

    signed = True
    default_feature = "simple"

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        proj_dim: int = 4096,
        num_timesteps: int = 10,
        strategy: str = "uniform",
        feature: Loss | str | None = None,
        num_noises: int = 1,
        query_noises: int | None = None,
        kind: str = "rademacher",
        lambda_: float | Iterable[float] | None = None,
        seed: int = 0,
        noise_seed: int = 0,
        batch_size: int = 16,
        timesteps_per_pass: int = 32,
        memory: int = features.MEMORY,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ):
        check_schedule(model, schedule, type(self).__name__)
        self.feature_map = FeatureMap(
            schedule=schedule,
            loss=self.default_feature if feature is None else feature,
            num_timesteps=num_timesteps,
            strategy=strategy,
            num_noises=num_noises,
            proj_dim=proj_dim,
            kind=kind,
            seed=seed,
            noise_seed=noise_seed,
        )
        self.query_map = self.feature_map
        if query_noises is not None:
            self.query_map = dataclasses.replace(self.feature_map, num_noises=query_noises)
        self.model, self.batch_size, self.timesteps_per_pass = model, batch_size, timesteps_per_pass
        self.memory = memory
        self.directory = None if directory is None else Path(directory)
        self.progress = progress
        self._asked_lambda = None if lambda_ is None else self._lambdas(lambda_)
        self._kernel: DampedKernel | None = None
        self._model: dict = {}  # which network was fitted
        self._queries: tuple[str, Features] | None = None

    def fit(self, train) -> "TRAK":
        """Compute the features of the training images and decompose their kernel.

        Args:
            train: [N, C, H, W] uint8, or floating point in [-1, 1]; image n has noise id n.

        Returns:
            self.

        Raises:
            ValueError, DamagedFileError: see :func:`pyattr.diffusion.features.compute`; or the features are zero or not
                finite.

        Extra memory: that of the features and of :class:`~pyattr.attribution.kernel.DampedKernel`.
        """
        train = as_images(train, type(self).__name__, "train")
        found = self._features(self.feature_map, train, torch.arange(len(train)), "train", "features")
        self.progress(0, 1, "eigendecomposition")
        self._kernel = DampedKernel(found, reference_parameter(self.model, type(self).__name__).device)
        self.eigenvalues = self._kernel.eigenvalues
        self.lambda_ = choose_lambda(self.eigenvalues, self._asked_lambda)
        self.progress(1, 1, "eigendecomposition")
        self._model, self._queries = identity(self.model), None
        return self

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

        Extra memory: the queries' features, and :meth:`DampedKernel.scores`'s.
        """
        name = type(self).__name__
        if self._kernel is None:
            raise RuntimeError(f"{name}: fit must be called before scores")
        if lambda_ is not None:
            lambda_ = self._lambdas(lambda_)
            if isinstance(lambda_, list):
                raise ValueError(f"{name}: lambda_ must be one number here, got {len(lambda_)}")
        images = query_images(queries, name)
        ids = query_ids(queries, ids, len(images))
        if len(images) == 0:
            return torch.empty(0, len(self._kernel.features), dtype=torch.float32, device="cpu")
        changed = differences(self._model, identity(self.model))
        if changed:
            raise ValueError(f"{name}: the model has changed since fit ({changed}); fit again")
        key = tensors_hash({"images": images, "ids": ids})
        if self._queries is None or self._queries[0] != key:
            folder = f"queries-{key[:16]}-{self.query_map.num_noises}"
            self._queries = key, self._features(self.query_map, images, ids, folder, "query features")
        phi = self._queries[1].tensor()  # [Q, D]
        return self._kernel.scores(phi, self.lambda_ if lambda_ is None else lambda_)

    def _features(self, feature_map: FeatureMap, images: Tensor, ids: Tensor, folder: str, stage: str) -> Features:
        return features.compute(
            self.model,
            images,
            feature_map,
            ids=ids,
            batch_size=self.batch_size,
            timesteps_per_pass=self.timesteps_per_pass,
            memory=self.memory,
            directory=None if self.directory is None else self.directory / folder,
            progress=self.progress,
            stage=stage,
        )

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
