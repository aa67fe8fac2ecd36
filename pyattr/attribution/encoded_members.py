"""The members of an encoded ensemble: how they are trained, where they lie, and what they predict together."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.checkpoint import checkpoints, identity, load_model
from ..diffusion.images import predict_noise
from ..diffusion.members import Recipe, in_processes
from ..diffusion.progress import Progress


class Mixture(nn.Module):
    """The weighted mean of members, as a model that predicts noise; summed in float32 or better.

    Args:
        members: n networks.
        weights: v, [n]; or one row for each image of a batch, [B, n]. A member of weight 0 is not asked.
    """

    def __init__(self, members: list[nn.Module], weights: Tensor):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = weights.to("cpu", torch.float64)

    def identity(self) -> dict:
        """What tells it from others, for the settings of stored results."""
        members = json.dumps([identity(member) for member in self.members], sort_keys=True)
        return {
            "model": hashlib.sha256(members.encode()).hexdigest(),
            "members": len(self.members),
            "weights": self.weights.tolist(),
        }

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:  # [B, C, H, W], [B] -> [B, C, H, W]
        weights = self.weights.expand(len(images), -1)  # [B, n]
        wide = torch.promote_types(images.dtype, torch.float32)  # of the sum, whatever the members work in
        out = torch.zeros_like(images, dtype=wide)
        for i, member in enumerate(self.members):
            rows = weights[:, i].nonzero()[:, 0].to(images.device)
            if len(rows) == 0:
                continue
            scale = weights[:, i].to(images.device, wide)[:, None, None, None]
            if len(rows) == len(images):
                out += scale * predict_noise(member, images, timesteps)
            else:
                out[rows] += scale[rows] * predict_noise(member, images[rows], timesteps[rows])
        return out.to(images.dtype)


def folder(directory: Path, member: int) -> Path:
    """Where a member's checkpoints lie."""
    return directory / f"member-{member:02d}"


def trained(directory: Path, member: int, steps: int) -> bool:
    """Whether a member's training is over."""
    return steps in checkpoints(folder(directory, member))


def load(recipe: Recipe, directory: Path, member: int, shape: tuple[int, int, int]) -> nn.Module:
    """A trained member from its last checkpoint."""
    path = checkpoints(folder(directory, member))[recipe.training["steps"]]
    return load_model(path, into=recipe.build(member, shape))


class _Total:
    """Progress of all members together: optimiser steps, those found done included."""

    def __init__(self, progress: Progress, members: list[int], steps: int):
        self.progress, self.steps = progress, steps
        self.done = dict.fromkeys(members, 0)

    def __call__(self, member: int, done: int) -> None:
        self.done[member] = done
        self.progress(sum(self.done.values()), self.steps * len(self.done), "train")


def train_members(
    recipe: Recipe,
    images: Tensor,
    splits: np.ndarray,
    members: list[int],
    directory: Path | None,
    workers: int,
    progress: Progress,
) -> dict[int, nn.Module]:
    """Train members, one after the other or in several processes.

    Args:
        splits: [N, n] bool, which member sees which image.
        members: which to train.
        directory: of the checkpoints; several processes need one.

    Returns:
        The members trained here; in several processes none, since they lie in the directory.
    """
    total = _Total(progress, members, recipe.training["steps"])
    work = functools.partial(_train_member, recipe, splits, directory)
    if workers > 1 and len(members) > 1:
        in_processes(
            work,
            members,
            {"images": images},
            directory=directory,
            workers=workers,
            tell=total,
            op="EncodedEnsemble",
            again="fit again",
            name="member {}".format,
        )
        return {}
    shared = {"images": images}
    return {member: work(member, shared, functools.partial(total, member)) for member in members}


def _train_member(
    recipe: Recipe,
    splits: np.ndarray,
    directory: Path | None,
    member: int,
    shared: dict[str, Tensor],
    tell: Callable[[int], None],
) -> nn.Module:
    images = shared["images"]
    rows = torch.from_numpy(splits[:, member].nonzero()[0])
    where = None if directory is None else folder(directory, member)
    return recipe.train(member, images[rows.to(images.device)], where, lambda done, _total, _stage: tell(done))
