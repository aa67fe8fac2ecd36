"""Encoded ensembles: members trained on splits that name each item, so that ablating it means leaving its members out."""

import dataclasses
import inspect
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.images import as_images
from ..diffusion.presets import PRESETS
from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import Samples, sample
from ..diffusion.schedule import Schedule
from ..diffusion.storage import data_hash, differences, load_tensors, save_tensors
from ..diffusion.train import check_options, train
from .codes import ablation_weights, as_codes, membership, random_codes
from .encoded_members import Mixture, Recipe, load, train_members, trained
from .encoded_samples import Replay

RECORD = "ensemble.safetensors"
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(train).parameters.items()
    if name not in ("model", "images", "schedule", "seed", "checkpoint_directory", "progress")
}
_BLOCK = 1 << 16  # codes weighed at a time


class EncodedEnsemble:
    """Counterfactual images without retraining: an ensemble of which some members never saw an item.

    Each of N training items has an n-bit code c; member i is trained on the items with bit i set. The ensemble predicts the
    noise ``sum_i v_i f_i(x_t, t)``, v uniform. To take an item away is to sample again, with the same exogenous noise, from the
    members that did not see it: ``u_{-x} = (1 - c) / (n - h)``, h the number of ones. The derivative J of the image with
    respect to v guesses all such images at once, y + J (u_{-x} - v), and an item's influence is the norm of that change.

    Sign: a magnitude: how much the image changes when the item is taken away. There are no opponents.

    Args:
        model: builds a member, without arguments, from torch's random state; or the name of a preset of
            :func:`pyattr.diffusion.unet`.
        codes: [N] integers, see :mod:`pyattr.attribution.codes`; None: :func:`~pyattr.attribution.codes.random_codes` of
            ``num_members``, ``weight`` and ``seed`` in :meth:`fit`.
        num_members: n, in [2, 64].
        weight: h of random codes.
        schedule: of the diffusion.
        directory: where the codes and each member's checkpoints lie; None keeps the members in memory.
        seed: of random codes, and of each member's initial weights and training, which are independent of one another.
        training: the options of :func:`pyattr.diffusion.train`; ``steps`` at least. Of ``keep_checkpoints`` the default is 1.

    Attributes:
        codes: [N] uint64, once they are known.
        signed: False.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174.
    """

    signed = False

    def __init__(
        self,
        model: Callable[[], nn.Module] | str,
        codes=None,
        *,
        num_members: int,
        weight: int | None = None,
        schedule: Schedule,
        directory: str | os.PathLike | None = None,
        seed: int = 0,
        **training,
    ):
        if isinstance(model, str):
            if model not in PRESETS:
                raise ValueError(
                    f"EncodedEnsemble: model must be a factory or one of {', '.join(PRESETS)}, got {model!r}"
                )
        elif isinstance(model, nn.Module) or not callable(model):
            raise TypeError(f"EncodedEnsemble: model must build a member, got {type(model).__name__}")
        unknown = sorted(set(training) - set(_DEFAULTS))
        if unknown:
            raise TypeError(f"EncodedEnsemble: {unknown[0]} is no option of training")
        if "steps" not in training:
            raise TypeError("EncodedEnsemble: steps must be given, the optimiser steps of each member")
        checked = set(inspect.signature(check_options).parameters) - {"seed"}
        check_options(**{name: {**_DEFAULTS, **training}[name] for name in checked}, seed=seed)
        if codes is None:
            random_codes(0, num_members, weight=weight, seed=seed)  # refuses what it cannot take
        elif weight is not None:
            raise ValueError("EncodedEnsemble: weight must be None where codes are given")
        self.num_members = num_members
        self.codes = None if codes is None else as_codes(codes, num_members, "EncodedEnsemble")
        self.directory = None if directory is None else Path(directory)
        self.recipe = Recipe(model, schedule, training, seed)
        self.shape: tuple[int, int, int] | None = None  # of an image, once it is known
        self._weight = weight
        self._members: dict[int, nn.Module] = {}
        self._jacobian: tuple[str, Tensor] | None = None

    @classmethod
    def open(
        cls, directory: str | os.PathLike, model: Callable[[], nn.Module] | str | None = None
    ) -> "EncodedEnsemble":
        """An ensemble from its directory, without its images.

        Args:
            directory: that of an ensemble on which :meth:`fit` was called.
            model: what built its members; needed where that was no preset.

        Raises:
            FileNotFoundError, DamagedFileError: there is no such ensemble, or its bytes changed.
            ValueError: the model is missing.
        """
        tensors, record = load_tensors(Path(directory) / RECORD)
        if model is None and record["model"] is None:
            raise ValueError(f"EncodedEnsemble: {directory} does not say how to build its members: give a model")
        ensemble = cls(
            record["model"] if model is None else model,
            tensors["codes"].numpy().view(np.uint64),
            num_members=record["num_members"],
            schedule=Schedule(**record["schedule"]),
            directory=directory,
            seed=record["seed"],
            **record["training"],
        )
        ensemble.shape = tuple(record["shape"])
        return ensemble

    def fit(
        self, images, *, workers: int = 1, members: Iterable[int] | None = None, progress: Progress = silent
    ) -> "EncodedEnsemble":
        """Train the members, each on the images whose codes have its bit.

        With a directory, members that are done are not trained again, and one that was interrupted goes on where it was.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1].
            workers: processes that train members side by side, with as many threads each as torch has here; the members are
                the same bits as from one. The model must then be importable by name, and a directory be given.
            members: which to train; None: all.
            progress: stage "train", counts optimiser steps of all these members.

        Returns:
            self.

        Raises:
            ValueError: an argument is not as above, codes and images do not fit together, or the directory holds another
                ensemble.
            RuntimeError: a process failed.

        Extra memory: for each worker its member's images and that of :func:`pyattr.diffusion.train`; workers share a file of
        all images, which lies in the directory meanwhile.
        """
        images = as_images(images, "EncodedEnsemble", "images")
        if self.codes is None:
            seed, weight = self.recipe.seed, self._weight
            self.codes = random_codes(len(images), self.num_members, weight=weight, seed=seed)
        if len(self.codes) != len(images):
            raise ValueError(f"EncodedEnsemble: images must be as many as codes, {len(self.codes)}, got {len(images)}")
        members = list(range(self.num_members)) if members is None else sorted(set(members))
        for member in members:
            if not 0 <= member < self.num_members:
                raise ValueError(f"EncodedEnsemble: members must lie in [0, {self.num_members}), got {member}")
        if workers < 1:
            raise ValueError(f"EncodedEnsemble: workers must be at least 1, got {workers}")
        if workers > 1:
            self._check_processes()
        splits = membership(self.codes, self.num_members)
        empty = [member for member in members if not splits[:, member].any()]
        if empty:
            raise ValueError(f"EncodedEnsemble: codes must give each member an image, got none for member {empty[0]}")
        self.shape, self._jacobian = tuple(images.shape[1:]), None
        if self.directory is not None:
            self._record(images)
        # One of an earlier call may have seen other images.
        self._members = {i: member for i, member in self._members.items() if i not in members}
        self._members |= train_members(self.recipe, images, splits, members, self.directory, workers, progress)
        return self

    def _check_processes(self) -> None:
        if self.directory is None:
            raise ValueError("EncodedEnsemble: workers must be 1 without a directory")
        try:
            pickle.dumps(self.recipe)
        except Exception as error:
            raise ValueError(
                f"EncodedEnsemble: model must be importable by name where workers are several, got {error}"
            ) from None

    def _record(self, images: Tensor) -> None:
        """Write what the ensemble is, or compare it with what is there."""
        recipe = self.recipe
        record = {
            "kind": "encoded ensemble",
            "num_members": self.num_members,
            "model": recipe.model if isinstance(recipe.model, str) else None,
            "schedule": dataclasses.asdict(recipe.schedule),
            "training": recipe.training,
            "seed": recipe.seed,
            "shape": list(self.shape),
            "images": data_hash(images),
        }
        tensors = {"codes": torch.from_numpy(self.codes.view(np.int64))}
        path = self.directory / RECORD
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            save_tensors(path, tensors, record)
            return
        kept, made = load_tensors(path)
        differ = differences(made, record)
        if not torch.equal(kept["codes"], tensors["codes"]):
            differ = differ or "the codes differ"
        if differ:
            raise ValueError(
                f"EncodedEnsemble: directory {self.directory} holds another ensemble: {differ}; use another directory"
            )

    @property
    def members(self) -> list[nn.Module]:
        """The n trained networks, in eval mode; read from the directory when they are first asked for.

        Raises:
            RuntimeError: :meth:`fit` was not called, or has not trained them all.
        """
        if self.shape is None:
            raise RuntimeError("EncodedEnsemble: fit or open must be called first")
        missing = [i for i in range(self.num_members) if i not in self._members]
        untrained = missing
        if self.directory is not None:
            steps = self.recipe.training["steps"]
            untrained = [i for i in missing if not trained(self.directory, i, steps)]
        if untrained:
            raise RuntimeError(
                f"EncodedEnsemble: {len(untrained)} of {self.num_members} members are not trained, "
                f"the first is member {untrained[0]}: call fit"
            )
        for i in missing:
            self._members[i] = load(self.recipe, self.directory, i, self.shape)
        return [self._members[i] for i in range(self.num_members)]

    def sample(
        self,
        num_images: int | None = None,
        *,
        ids=None,
        weights=None,
        method: str = "published",
        steps: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        clip: bool = True,
        record: str = "noise",
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Samples:
        """Generate images with the weighted mean of the members' predictions.

        Args:
            weights: v, [n]; 1 / n each if None.
            method: "published" is the authors' own; see :func:`pyattr.diffusion.sample`.
            steps: None: T, or for "ddim" the smaller of T and 50.
            num_images, ids, eta, seed, batch_size, clip, record, directory, progress: see there.

        Returns:
            :class:`~pyattr.diffusion.Samples` with every slice of exogenous noise, in [-1, 1].

        Raises:
            RuntimeError: not all members are trained.
            ValueError: an argument is not as above.
        """
        members, schedule = self.members, self.recipe.schedule
        if steps is None:
            steps = min(schedule.num_timesteps, 50) if method == "ddim" else schedule.num_timesteps
        return sample(
            Mixture(members, self._weights(weights)),
            schedule,
            num_images=num_images,
            ids=ids,
            shape=self.shape,
            method=method,
            steps=steps,
            eta=eta,
            seed=seed,
            batch_size=batch_size,
            clip=clip,
            record=record,
            directory=directory,
            progress=progress,
        )

    def _weights(self, weights) -> Tensor:  # -> [n] float64
        if weights is None:
            return torch.full((self.num_members,), 1 / self.num_members, dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        if weights.shape != (self.num_members,):
            raise ValueError(
                f"EncodedEnsemble: weights must have shape [{self.num_members}], got {list(weights.shape)}"
            )
        return weights

    def counterfactual(
        self,
        samples: Samples,
        codes,
        *,
        batch_size: int = 64,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """The samples without an item: made again with the same noise by the members that did not see it.

        Args:
            samples: Q, of :meth:`sample`.
            codes: [M], of the items; equal ones are sampled once.
            batch_size: images that go through a member together.
            directory: batches are kept there, and an interrupted call goes on from there.
            progress: stage "counterfactual", counts steps of images.

        Returns:
            [Q, M, C, H, W] float32, in the samples' range [-1, 1]. The same call gives the same bits; other batches the same
            images to the rounding of the networks.

        Raises:
            TypeError, ValueError: an argument is not as above, the samples are of another ensemble, or the directory was made
                otherwise.

        Extra memory: the images of distinct codes, and the members' for a batch.

        Source: Dai, Gifford 2023, section 3.
        """
        replay = self._replay(samples, batch_size, directory, progress)
        distinct, places = np.unique(as_codes(codes, self.num_members, "EncodedEnsemble"), return_inverse=True)
        images = replay.reweighted(torch.from_numpy(ablation_weights(distinct, self.num_members)), "counterfactual")
        return images[:, torch.from_numpy(places)]

    def _replay(self, samples: Samples, batch_size: int, directory, progress: Progress) -> Replay:
        if not isinstance(samples, Samples):
            raise TypeError(
                "EncodedEnsemble: queries must be Samples of this ensemble, which hold the noise that they were made from, "
                f"got {type(samples).__name__}"
            )
        if batch_size < 1:
            raise ValueError(f"EncodedEnsemble: batch_size must be at least 1, got {batch_size}")
        made = samples.settings
        weights = self._weights(made.get("weights"))
        differ = differences({name: made.get(name) for name in ("model", "members")}, self._identity(weights))
        if differ:
            raise ValueError(f"EncodedEnsemble: queries must be samples of this ensemble: {differ}")
        directory = None if directory is None else Path(directory)
        return Replay(self.members, weights, samples, batch_size, directory, progress)

    def _identity(self, weights: Tensor) -> dict:
        identity = Mixture(self.members, weights).identity()
        return {name: identity[name] for name in ("model", "members")}
