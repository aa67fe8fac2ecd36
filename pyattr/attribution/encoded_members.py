"""The members of an encoded ensemble: how they are trained, where they lie, and what they predict together."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.checkpoint import checkpoints, identity, load_model
from ..diffusion.images import predict_noise
from ..diffusion.presets import unet
from ..diffusion.progress import Progress
from ..diffusion.schedule import Schedule
from ..diffusion.train import train
from ..reference.philox import philox4x32_10

_MEMBERS = 0x6D656D62  # key word 1 of the members' seeds
_LOOK_SECONDS = 1.0  # between looks at processes that may have died


class Mixture(nn.Module):
    """The weighted mean of members, as a model that predicts noise.

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
        out = torch.zeros_like(images)
        for i, member in enumerate(self.members):
            rows = weights[:, i].nonzero()[:, 0].to(images.device)
            if len(rows) == 0:
                continue
            scale = weights[:, i].to(images.device, images.dtype)[:, None, None, None]
            if len(rows) == len(images):
                out += scale * predict_noise(member, images, timesteps)
            else:
                out[rows] += scale[rows] * predict_noise(member, images[rows], timesteps[rows])
        return out


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of the members, but for the images.

    Attributes:
        model: a factory, or the name of a preset.
        schedule: of the diffusion.
        training: the options of :func:`pyattr.diffusion.train`.
        seed: of the members' seeds.
        device: where members are; None: where the factory puts them. Their initial weights are the same everywhere.
    """

    model: Callable[[], nn.Module] | str
    schedule: Schedule
    training: dict
    seed: int
    device: torch.device | str | None = None

    def seeds(self, member: int) -> tuple[int, int]:
        """The seeds of a member's initial weights and of its training."""
        words = philox4x32_10((member, 0, 0, 0), (self.seed, _MEMBERS))
        return int(words[0]), int(words[1])

    def build(self, member: int, shape: tuple[int, int, int]) -> nn.Module:
        """A member before its training; torch's random state stays as it is."""
        factory = self.model
        if isinstance(factory, str):
            channels, height, width = shape
            if height != width:
                raise ValueError(f"EncodedEnsemble: {factory} needs square images, got {height} x {width}")
            factory = functools.partial(unet, factory, channels=channels, size=height, schedule=self.schedule)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(self.seeds(member)[0])
            model = factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"EncodedEnsemble: model must build a torch module, got {type(model).__name__}")
        return model if self.device is None else model.to(self.device)

    def train(self, member: int, images: Tensor, directory: Path | None, progress: Progress) -> nn.Module:
        """Train a member on its images, or go on where it was interrupted."""
        model = self.build(member, tuple(images.shape[1:]))
        options = {"keep_checkpoints": 1, **self.training}
        return train(
            model,
            images,
            schedule=self.schedule,
            seed=self.seeds(member)[1],
            checkpoint_directory=None if directory is None else folder(directory, member),
            progress=progress,
            **options,
        ).model


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
    if workers > 1 and len(members) > 1:
        _train_in_processes(recipe, images, splits, members, directory, min(workers, len(members)), total)
        return {}
    made = {}
    for member in members:
        rows = torch.from_numpy(splits[:, member].nonzero()[0])
        made[member] = recipe.train(
            member, images[rows.to(images.device)], directory, lambda done, _total, _stage, i=member: total(i, done)
        )
    return made


def _train_in_processes(
    recipe: Recipe, images: Tensor, splits: np.ndarray, members: list[int], directory: Path, workers: int, total: _Total
) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, news = context.Queue(), context.Queue()
    for task in [*members, *[None] * workers]:
        tasks.put(task)
    opened, to_open = context.Semaphore(0), workers
    with tempfile.TemporaryDirectory(dir=directory, prefix=".images-", ignore_cleanup_errors=True) as temporary:
        # A file that all processes map, since shared memory is short where containers limit it.
        path = Path(temporary) / "images.pt"
        torch.save(images.cpu(), path)
        arguments = recipe, path, opened, splits, directory, torch.get_num_threads(), tasks, news
        processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        with _running(processes):
            at_work = workers
            while at_work:
                while to_open and opened.acquire(block=False):
                    to_open -= 1
                    if to_open == 0:
                        path.unlink()  # it stays as long as it is mapped, but not after all are killed
                try:
                    member, done, error = news.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    dead = [process.exitcode for process in processes if process.exitcode]
                    if dead:
                        raise RuntimeError(
                            f"EncodedEnsemble: a training process ended with exit code {dead[0]}; fit again goes on from there"
                        ) from None
                    continue
                if error is not None:
                    raise RuntimeError(f"EncodedEnsemble: training of member {member} failed: {error}")
                if member is None:
                    at_work -= 1
                else:
                    total(member, done)


@contextlib.contextmanager
def _running(processes: list) -> Iterator[None]:
    """Processes that end with the block, however it ends."""
    try:
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _work(recipe: Recipe, path: Path, opened, splits: np.ndarray, directory: Path, threads: int, tasks, news) -> None:
    """A training process. As many threads as in the calling one, on whose number the bits depend."""
    # Ctrl-C in a terminal reaches this process too; the calling one tells of it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    images = torch.load(path, mmap=True, weights_only=True)
    opened.release()

    def tell(member: int, done: int) -> None:
        if not multiprocessing.parent_process().is_alive():
            # Killed. Left alone, this process would train on beside those of the next call, into the same files.
            news.cancel_join_thread()
            sys.exit(1)
        news.put((member, done, None))

    while (member := tasks.get()) is not None:
        rows = torch.from_numpy(splits[:, member].nonzero()[0])
        try:
            recipe.train(member, images[rows], directory, lambda done, _total, _stage, i=member: tell(i, done))
        except Exception as error:
            news.put((member, 0, f"{type(error).__name__}: {error}"))
            return
    news.put((None, 0, None))
