"""The members of an encoded ensemble: how they are trained, where they lie, and what they predict together."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
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


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of the members, but for the images.

    Attributes:
        model: a factory, or the name of a preset.
        schedule: of the diffusion.
        training: all options of :func:`pyattr.diffusion.train`.
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
        return train(
            model,
            images,
            schedule=self.schedule,
            seed=self.seeds(member)[1],
            checkpoint_directory=None if directory is None else folder(directory, member),
            progress=progress,
            **self.training,
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
    context, waiting = multiprocessing.get_context("spawn"), iter(members)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".images-", ignore_cleanup_errors=True) as temporary:
        # A file that all processes map, since shared memory is short where containers limit it.
        path = Path(temporary) / "images.pt"
        torch.save(images.cpu(), path)
        arguments = recipe, path, splits, directory, torch.get_num_threads()
        to_open = workers
        with _running() as running:
            for _ in range(workers):
                running.append(_Worker(context, arguments))
                running[-1].give(next(waiting))
            while at_work := {worker.connection: worker for worker in running if worker.member is not None}:
                for connection in multiprocessing.connection.wait(list(at_work)):
                    worker = at_work[connection]
                    kind, news = worker.hear()
                    if kind == "opened":
                        to_open -= 1
                        if to_open == 0:
                            path.unlink()  # it stays as long as it is mapped, but not after all are killed
                    elif kind == "steps":
                        total(worker.member, news)
                    elif kind == "trained":
                        worker.give(next(waiting, None))
                    else:
                        raise RuntimeError(f"EncodedEnsemble: training of member {worker.member} failed: {news}")


class _Worker:
    """A training process, as the calling one sees it.

    Each has a pipe of its own: what several share is left locked, or with half a message in it, by one that is killed.

    Attributes:
        member: the one that it trains; None once it has no more to do.
    """

    def __init__(self, context, arguments: tuple):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.member: int | None = None

    def give(self, member: int | None) -> None:
        """A member to train; None: no more."""
        self.member = member
        with contextlib.suppress(OSError):  # that the process is dead is what is heard next
            self.connection.send(member)

    def hear(self) -> tuple:
        """The next message of the process, (kind, content); its death is an error."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode
        how = {-signal.SIGKILL: " (killed: the memory may not suffice for so many workers)"}.get(code, "")
        raise RuntimeError(
            f"EncodedEnsemble: the process of member {self.member} ended with exit code {code}{how}; "
            "what is trained is kept, and fit again goes on from there"
        )


@contextlib.contextmanager
def _running() -> Iterator[list[_Worker]]:
    """Processes that end with the block, however it ends."""
    workers: list[_Worker] = []
    try:
        yield workers
        for worker in workers:
            worker.process.join()
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
            worker.connection.close()


def _work(connection, recipe: Recipe, path: Path, splits: np.ndarray, directory: Path, threads: int) -> None:
    """A training process. As many threads as in the calling one, on whose number the bits depend."""
    # Ctrl-C in a terminal reaches this process too; the calling one tells of it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)

    def tell(kind: str, content=None) -> None:
        try:
            connection.send((kind, content))
        except OSError:
            # The calling one was killed. Left alone, this process would train on beside those of the next call, into the
            # same files.
            sys.exit(1)

    images = torch.load(path, mmap=True, weights_only=True)
    tell("opened")
    with contextlib.suppress(EOFError):  # the calling one was killed
        while (member := connection.recv()) is not None:
            rows = torch.from_numpy(splits[:, member].nonzero()[0])
            try:
                recipe.train(member, images[rows], directory, lambda done, _total, _stage: tell("steps", done))
            except Exception as error:
                return tell("failed", f"{type(error).__name__}: {error}")
            tell("trained")
