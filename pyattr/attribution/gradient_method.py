"""What the methods of gradients share: one way from images to features, and one place where features are kept."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import features
from ..diffusion.checkpoint import identity
from ..diffusion.conditioned import Examples, as_examples, contents
from ..diffusion.features import FeatureMap, Features
from ..diffusion.images import reference_parameter
from ..diffusion.losses import Loss
from ..diffusion.progress import Progress, silent
from ..diffusion.schedule import Schedule, check_schedule
from ..diffusion.storage import differences, tensors_hash
from .queries import query_ids, query_images


class GradientMethod:
    """A method whose scores are made of projected gradients, ``phi = M (1 / K) sum_t grad f(x_t, t)``.

    Features are a function of the network, the images, their noise ids and the settings below, of nothing that a method adds.
    So methods with the same settings and one ``directory`` find each other's: the second computes no gradient.

    Args:
        model: the trained network; ``model(x_t, t)`` predicts the noise.
        schedule: the one it was trained with.
        proj_dim: D.
        num_timesteps, strategy, num_noises, kind, noise_seed, normalize: see :class:`~pyattr.diffusion.features.FeatureMap`.
        query_noises: draws of the noise at each timestep of a query; None: ``num_noises``, as published. Queries are few,
            so more of them take their share of the noise off the scores at little cost.
        feature: f, a :class:`~pyattr.diffusion.Loss` or its name; None for the method's own.
        seed: of the projection.
        batch_size: images whose gradients are taken together.
        timesteps_per_pass: rows of one image that go through the model together, at most.
        memory: bytes that the gradients of a batch may take; see :meth:`~pyattr.diffusion.features.FeatureMap.batch`.
        directory: where features are kept as they are made and found again; None keeps them in memory.
        progress: stages "features", "query features".

    Attributes:
        signed: True: negative scores mean opponents.

    Raises:
        ValueError: an argument is not as above.
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
        seed: int = 0,
        noise_seed: int = 0,
        normalize: bool = False,
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
            normalize=normalize,
        )
        self.query_map = self.feature_map
        if query_noises is not None:
            self.query_map = dataclasses.replace(self.feature_map, num_noises=query_noises)
        self.model, self.batch_size, self.timesteps_per_pass = model, batch_size, timesteps_per_pass
        self.memory = memory
        self.directory = None if directory is None else Path(directory)
        self.progress = progress
        self._train: list[Features] = []  # of each network
        self._identities: list[dict] = []  # of the networks that were fitted
        self._queries: tuple[str, list[Features]] | None = None

    def fit(self, train):
        """Compute the features of the training images.

        Args:
            train: [N, C, H, W] uint8, or floating point in [-1, 1]; for a conditional model
                :class:`~pyattr.diffusion.Conditioned`. Image n has noise id n.

        Returns:
            self.

        Raises:
            ValueError, DamagedFileError: see :func:`pyattr.diffusion.features.compute`; or, for methods that decompose their
                Gram matrix, they are all zero or not finite.

        Extra memory: that of the features, and of :class:`~pyattr.attribution.kernel.DampedKernel` for those methods.
        """
        name = type(self).__name__
        train = as_examples(train, name, "train")
        found, identities = [], []
        for number, model in enumerate(self._networks()):
            identities.append(identity(model))
            place = self._place(model), "train"
            found.append(self._features(number, model, self.feature_map, train, torch.arange(len(train)), place))
        self._prepare(found)
        self._train, self._identities, self._queries = found, identities, None
        return self

    def _prepare(self, found: list[Features]) -> None:
        """Make of the training images' features what scores need besides."""

    @property
    def device(self) -> torch.device:
        """Where the model lies, and scores are computed."""
        return reference_parameter(self.model, type(self).__name__).device

    def _networks(self) -> Iterator[nn.Module]:
        """The networks whose gradients count, one at a time."""
        yield self.model

    def _num_networks(self) -> int:
        return 1

    def _place(self, model: nn.Module) -> str:
        """The folder of a network's features, within the directory."""
        return ""

    def _asked(self, queries, ids) -> tuple[Examples, Tensor, FeatureMap]:
        """What the features of queries are computed from: images, noise ids, and how."""
        images = query_images(queries, type(self).__name__)
        return images, query_ids(queries, ids, len(images)), self.query_map

    def _query_features(self, queries, ids) -> list[Features]:
        """Features of queries, for each network; those of the last queries are kept.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: a network has changed since, or an argument is not as it should be.
        """
        self._check_fitted()
        images, ids, feature_map = self._asked(queries, ids)
        if len(images) == 0:
            none = torch.empty(0, feature_map.proj_dim, dtype=torch.float32, device="cpu")
            return [Features.from_tensor(none, ids)] * len(self._train)
        key = tensors_hash({**contents(images), "ids": ids})
        kept = self._queries[1] if self._queries is not None and self._queries[0] == key else None
        found = []
        for number, model in enumerate(self._networks()):
            self._check_unchanged(number, model)
            if kept is None:
                place = self._place(model), f"queries-{key[:16]}-{feature_map.num_noises}"
                found.append(self._features(number, model, feature_map, images, ids, place, "query features"))
        if kept is None:
            self._queries = key, found
        return self._queries[1]

    def _check_fitted(self) -> None:
        if not self._train:
            raise RuntimeError(f"{type(self).__name__}: fit must be called before scores")

    def _check_unchanged(self, number: int, model: nn.Module) -> None:
        changed = differences(self._identities[number], identity(model))
        if changed:
            raise ValueError(f"{type(self).__name__}: the model has changed since fit ({changed}); fit again")

    def _features(
        self,
        number: int,
        model: nn.Module,
        feature_map: FeatureMap,
        images: Examples,
        ids: Tensor,
        place: tuple[str, str],
        stage: str = "features",
        of: int | None = None,
    ) -> Features:
        """The features of a network: the one of this number of those that progress counts together, all networks or ``of``."""
        networks = self._num_networks() if of is None else of

        def progress(done: int, total: int, stage: str) -> None:
            self.progress(number * total + done, networks * total, stage)

        return features.compute(
            model,
            images,
            feature_map,
            ids=ids,
            batch_size=self.batch_size,
            timesteps_per_pass=self.timesteps_per_pass,
            memory=self.memory,
            directory=None if self.directory is None else self.directory.joinpath(*place),
            progress=progress,
            stage=stage,
        )
