"""Models trained by one recipe on parts of one set of images, one after the other or in several processes."""

import contextlib
import functools
import inspect
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..reference.philox import philox4x32_10
from .presets import PRESETS, unet
from .progress import Progress
from .schedule import Schedule
from .train import check_options, train

_MEMBERS = 0x6D656D62  # key word 1 of the seeds
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(train).parameters.items()
    if name not in ("model", "images", "schedule", "seed", "checkpoint_directory", "progress")
} | {"keep_checkpoints": 1}
PACE = ("checkpoint_every", "keep_checkpoints")  # options that decide which files there are, but not what is trained

# What a process does with a task: job(task, shared tensors, tell), where tell(n) says how far it is. What it returns is
# dropped: results go through files.
Job = Callable[[int, dict[str, Tensor], Callable[[int], None]], object]


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of the models, but for the images.

    Attributes:
        model: a factory, or the name of a preset.
        schedule: of the diffusion.
        training: all options of :func:`pyattr.diffusion.train`, see :func:`training_options`.
        seed: of the models' seeds.
        op: for error messages.
        device: where models are; None: where the factory puts them. Their initial weights are the same everywhere.
    """

    model: Callable[[], nn.Module] | str
    schedule: Schedule
    training: dict
    seed: int
    op: str
    device: torch.device | str | None = None

    def seeds(self, number: int) -> tuple[int, int]:
        """The seeds of a model's initial weights and of its training."""
        words = philox4x32_10((number, 0, 0, 0), (self.seed, _MEMBERS))
        return int(words[0]), int(words[1])

    def build(self, number: int, shape: tuple[int, int, int]) -> nn.Module:
        """A model before its training; torch's random state stays as it is."""
        factory = self.model
        if isinstance(factory, str):
            channels, height, width = shape
            if height != width:
                raise ValueError(f"{self.op}: {factory} needs square images, got {height} x {width}")
            factory = functools.partial(unet, factory, channels=channels, size=height, schedule=self.schedule)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(self.seeds(number)[0])
            model = factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.op}: model must build a torch module, got {type(model).__name__}")
        return model if self.device is None else model.to(self.device)

    def train(self, number: int, images: Tensor, folder: Path | None, progress: Progress) -> nn.Module:
        """Train a model on its images, or go on where it was interrupted."""
        return train(
            self.build(number, tuple(images.shape[1:])),
            images,
            schedule=self.schedule,
            seed=self.seeds(number)[1],
            checkpoint_directory=folder,
            progress=progress,
            **self.training,
        ).model


def check_model(model, op: str) -> None:
    """Refuse what is neither a factory nor the name of a preset.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(model, str):
        if model not in PRESETS:
            raise ValueError(f"{op}: model must be a factory or one of {', '.join(PRESETS)}, got {model!r}")
    elif isinstance(model, nn.Module) or not callable(model):
        raise TypeError(f"{op}: model must build a member, got {type(model).__name__}")


def training_options(given: dict, seed: int, op: str) -> dict:
    """All options of :func:`pyattr.diffusion.train` from some of them; of ``keep_checkpoints`` the default is 1.

    Raises:
        TypeError: an option that training does not have, or no ``steps``.
        ValueError: a value that training would refuse.
    """
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise TypeError(f"{op}: {unknown[0]} is no option of training")
    if "steps" not in given:
        raise TypeError(f"{op}: steps must be given, the optimiser steps of each member")
    options = {**DEFAULTS, **given}
    checked = set(inspect.signature(check_options).parameters) - {"seed"}
    check_options(**{name: options[name] for name in checked}, seed=seed)
    return options


def check_importable(recipe: Recipe) -> None:
    """Refuse a recipe that other processes could not be given.

    Raises:
        ValueError: it cannot be pickled.
    """
    try:
        pickle.dumps(recipe)
    except Exception as error:
        raise ValueError(
            f"{recipe.op}: model must be importable by name where workers are several, got {error}"
        ) from None


def in_processes(
    job: Job,
    tasks: list[int],
    shared: dict[str, Tensor],
    *,
    directory: Path,
    workers: int,
    tell: Callable[[int, int], None],
    op: str,
    again: str,
    name: Callable[[int], str],
) -> None:
    """Do tasks in several processes.

    Args:
        job: importable by name; does one task.
        tasks: at least one.
        shared: tensors that all tasks read. They go through a file in the directory, which is gone once all have opened it.
        workers: processes.
        tell: told (task, how far), in this process.
        op, again, name: for error messages: who asks, what goes on after a death, and what a task is called.

    Raises:
        RuntimeError: a task failed, or a process died; the others are ended.

    Extra memory: the tensors, which all processes map, once.
    """
    context, waiting = multiprocessing.get_context("spawn"), iter(tasks)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".images-", ignore_cleanup_errors=True) as temporary:
        # A file that all processes map, since shared memory is short where containers limit it.
        path = Path(temporary) / "images.pt"
        torch.save({key: tensor.cpu() for key, tensor in shared.items()}, path)
        to_open = workers = min(workers, len(tasks))
        with _running() as running:
            for _ in range(workers):
                running.append(_Worker(context, (job, path, torch.get_num_threads())))
                running[-1].give(next(waiting))
            while at_work := {worker.connection: worker for worker in running if worker.task is not None}:
                for connection in multiprocessing.connection.wait(list(at_work)):
                    worker = at_work[connection]
                    try:
                        kind, news = worker.hear()
                    except EOFError:
                        raise RuntimeError(
                            f"{op}: the process of {name(worker.task)} ended with exit code {worker.ended()}; "
                            f"what is trained is kept, and {again} goes on from there"
                        ) from None
                    if kind == "opened":
                        to_open -= 1
                        if to_open == 0:
                            path.unlink()  # it stays as long as it is mapped, but not after all are killed
                    elif kind == "at":
                        tell(worker.task, news)
                    elif kind == "done":
                        worker.give(next(waiting, None))
                    else:
                        raise RuntimeError(f"{op}: training of {name(worker.task)} failed: {news}")


class _Worker:
    """A process, as the calling one sees it.

    Each has a pipe of its own: what several share is left locked, or with half a message in it, by one that is killed.

    Attributes:
        task: the one that it does; None once it has no more to do.
    """

    def __init__(self, context, arguments: tuple):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.task: int | None = None

    def give(self, task: int | None) -> None:
        """A task to do; None: no more."""
        self.task = task
        with contextlib.suppress(OSError):  # that the process is dead is what is heard next
            self.connection.send(task)

    def hear(self) -> tuple:
        """The next message of the process, (kind, content).

        Raises:
            EOFError: it is dead.
        """
        try:
            return self.connection.recv()
        except OSError:
            raise EOFError from None

    def ended(self) -> str:
        """How a dead process ended."""
        self.process.join()
        code = self.process.exitcode
        killed = " (killed: the memory may not suffice for so many workers)"
        return f"{code}{killed if code == -signal.SIGKILL else ''}"


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


def _work(connection, job: Job, path: Path, threads: int) -> None:
    """A process. As many threads as in the calling one, on whose number the bits depend."""
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

    shared = torch.load(path, mmap=True, weights_only=True)
    tell("opened")
    with contextlib.suppress(EOFError):  # the calling one was killed
        while (task := connection.recv()) is not None:
            try:
                job(task, shared, lambda done: tell("at", done))
            except Exception as error:
                return tell("failed", f"{type(error).__name__}: {error}")
            tell("done")
