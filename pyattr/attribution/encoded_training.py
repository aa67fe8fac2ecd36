"""The members of an encoded ensemble as one thing: its codes, its training, its directory."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..diffusion.images import as_images
from ..diffusion.members import DEFAULTS, PACE, Recipe, check_importable, check_model, training_options
from ..diffusion.progress import Progress, silent
from ..diffusion.schedule import Schedule, as_schedule
from ..diffusion.storage import data_hash, differences, load_tensors, save_tensors
from ..ops._arguments import check_integer
from .codes import as_codes, membership, random_codes
from .encoded_members import load, train_members, trained

RECORD = "ensemble.safetensors"


class TrainedEnsemble:
    """What :class:`~pyattr.attribution.EncodedEnsemble`, whose arguments these are, can do before it samples."""

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
        device: torch.device | str | None = None,
        **training,
    ):
        check_model(model, "EncodedEnsemble")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"EncodedEnsemble: schedule must be a Schedule, got {type(schedule).__name__}")
        training = training_options(training, seed, "EncodedEnsemble")
        if codes is None:
            random_codes(0, num_members, weight=weight, seed=seed)  # refuses what it cannot take
        elif weight is not None:
            raise ValueError("EncodedEnsemble: weight must be None where codes are given")
        self.num_members = num_members
        # A copy, since what the caller does to theirs must not change what the members are said to have seen.
        self.codes = None if codes is None else as_codes(codes, num_members, "EncodedEnsemble").copy()
        self.directory = None if directory is None else Path(directory)
        self.recipe = Recipe(model, schedule, training, seed, "EncodedEnsemble", device)
        self.shape: tuple[int, int, int] | None = None  # of an image, once it is known
        self._weight = weight
        self._members: dict[int, nn.Module] = {}
        self._images: str | None = None  # a hash of those that they were trained on, once it is known

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        model: Callable[[], nn.Module] | str | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "TrainedEnsemble":
        """An ensemble from its directory, without its images.

        Args:
            directory: that of an ensemble on which :meth:`fit` was called.
            model: what built its members; needed where that was no preset.
            device: where members are; None: where the model's factory puts them.

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
            schedule=as_schedule(record["schedule"]),
            directory=directory,
            seed=record["seed"],
            device=device,
            **record["training"],
        )
        ensemble.shape = tuple(record["shape"])
        return ensemble

    def fit(
        self, images, *, workers: int = 1, members: Iterable[int] | None = None, progress: Progress = silent
    ) -> "TrainedEnsemble":
        """Train the members, each on the images whose codes have its bit.

        With a directory, members that are done are not trained again, and one that was interrupted goes on where it was.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1].
            workers: processes that train members side by side on the one device, with as many threads each as torch has
                here; the members are the same bits as from one. The model must then be importable by name, and a directory
                be given.
            members: which to train; None: all.
            progress: stage "train", counts optimiser steps of all these members.

        Returns:
            self. A call that fails leaves it as it was.

        Raises:
            TypeError, ValueError: an argument is not as above, codes and images do not fit together, or the directory holds
                another ensemble.
            RuntimeError: training failed, or a process died; the message names the member, and the others' work is kept.

        Extra memory: for each worker its member's images and that of :func:`pyattr.diffusion.train`; workers share a file of
        all images, which lies in the directory meanwhile.
        """
        images = as_images(images, "EncodedEnsemble", "images")
        codes = self.codes
        if codes is None:
            codes = random_codes(len(images), self.num_members, weight=self._weight, seed=self.recipe.seed)
        if len(codes) != len(images):
            raise ValueError(f"EncodedEnsemble: images must be as many as codes, {len(codes)}, got {len(images)}")
        last = self.num_members - 1
        asked = range(self.num_members) if members is None else members
        members = sorted({check_integer("EncodedEnsemble", "members", member, 0, last) for member in asked})
        workers = check_integer("EncodedEnsemble", "workers", workers, 1, 2**31)
        if workers > 1:
            self._check_processes()
        splits = membership(codes, self.num_members)
        empty = [member for member in members if not splits[:, member].any()]
        if empty:
            raise ValueError(f"EncodedEnsemble: codes must give each member an image, got none for member {empty[0]}")
        shape, seen = tuple(images.shape[1:]), data_hash(images)
        if self.directory is not None:
            if members:  # what cannot be built is refused before anything is written
                self.recipe.build(members[0], shape)
            self._record(codes, shape, seen)
        made = train_members(self.recipe, images, splits, members, self.directory, workers, progress)
        # All at once, and last, so that a call that fails leaves what was there.
        earlier = self._members if self._images in (None, seen) else {}  # those of other images are of another ensemble
        self._members = {i: member for i, member in earlier.items() if i not in members} | made
        self.codes, self.shape, self._images = codes, shape, seen
        return self

    def _check_processes(self) -> None:
        if self.directory is None:
            raise ValueError("EncodedEnsemble: workers must be 1 without a directory")
        check_importable(self.recipe)

    def _record(self, codes: np.ndarray, shape: tuple[int, int, int], images: str) -> None:
        """Write what the ensemble is, or compare it with what is there."""
        recipe = self.recipe
        record = {
            "kind": "encoded ensemble",
            "num_members": self.num_members,
            "model": recipe.model if isinstance(recipe.model, str) else None,
            "schedule": dataclasses.asdict(recipe.schedule),
            "training": recipe.training,
            "seed": recipe.seed,
            "shape": list(shape),
            "images": images,
        }
        tensors = {"codes": torch.from_numpy(codes.view(np.int64))}
        path = self.directory / RECORD
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            save_tensors(path, tensors, record)
            return
        kept, made = load_tensors(path)
        differ = differences(_deciding(made), _deciding(record))
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


def _deciding(record: dict) -> dict:
    """What of a record decides the members; options that it does not name are the default."""
    training = {**DEFAULTS, **record["training"]}
    return {**record, "training": {name: value for name, value in training.items() if name not in PACE}}
