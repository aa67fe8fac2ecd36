"""What evaluations by retraining share: the losses of queries under a model, and tasks that each end in a file."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..diffusion.conditioned import Examples, separate
from ..diffusion.images import predict_noise, reference_parameter, to_unit
from ..diffusion.losses import Loss
from ..diffusion.members import in_processes
from ..diffusion.noise import LOSSES, MAX_DRAWS, noise
from ..diffusion.progress import Progress
from ..diffusion.schedule import Schedule
from ..diffusion.storage import DamagedFileError, differences, load_tensors

TARGETS = ("simple", "elbo", "square", "l1", "linf")
TRAINING_PASSES = 3  # of an image in a training step: forward, and twice as much backward


@dataclass(frozen=True)
class QueryLosses:
    """How the losses of queries under a model are computed; see :func:`~pyattr.evaluation.build_ground_truth`."""

    timesteps: int = 100
    num_noises: int = 1
    noise_seed: int = 0
    targets: tuple[str, ...] = TARGETS
    rows_per_pass: int = 256

    def check(self, schedule: Schedule, op: str) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: the message names the argument.
        """
        for name, high in (
            ("timesteps", schedule.num_timesteps),
            ("num_noises", MAX_DRAWS),
            ("rows_per_pass", 2**31),
        ):
            check_between(op, name, getattr(self, name), 1, high)
        check_between(op, "noise_seed", self.noise_seed, 0, 2**32 - 1)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"{op}: targets must be distinct, and one at least, got {self.targets}")
        for target in self.targets:
            Loss(target)

    def times(self, schedule: Schedule) -> Tensor:  # -> [K] int64
        # In the middle of equal shares also where they are no whole numbers, so that no part of the schedule is left out.
        return (2 * torch.arange(self.timesteps) + 1) * schedule.num_timesteps // (2 * self.timesteps)

    def __call__(
        self,
        model: nn.Module,
        schedule: Schedule,
        queries: Examples,
        ids: Tensor,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:  # [Q, C, H, W], [Q] -> [F, E, Q] float64 on the CPU
        """The losses; ``tell`` is told how many noisy images went through the model."""
        like = reference_parameter(model, "QueryLosses")
        queries, conditions = separate(queries)
        functions = [Loss(target) for target in self.targets]
        times = self.times(schedule)
        rows, done = len(queries) * len(times), 0
        means = torch.empty(len(functions), self.num_noises, len(queries), dtype=torch.float64, device="cpu")
        for draw in range(self.num_noises):
            values = torch.empty(len(functions), rows, dtype=torch.float64, device="cpu")
            for start in range(0, rows, self.rows_per_pass):
                row = torch.arange(start, min(start + self.rows_per_pass, rows))
                which, t = row // len(times), times[row % len(times)]
                x = to_unit(queries[which.to(queries.device)], like)  # [B, C, H, W]
                eps = noise(
                    x.shape[1:], seed=self.noise_seed, ids=ids[which], timesteps=t, draws=draw, purpose=LOSSES
                ).to(x)
                told = () if conditions is None else (conditions[which].to(x.device),)
                with torch.no_grad():
                    prediction = predict_noise(model, schedule.add_noise(x, eps, t), t.to(x.device), *told)
                    wide = prediction.double(), eps.double(), t.to(x.device), schedule
                    values[:, row] = torch.stack([function(*wide) for function in functions]).cpu()
                done += len(row)
                tell(done)
            means[:, draw] = values.unflatten(1, (len(queries), len(times))).mean(2)
        return means


class Tasks(Protocol):
    """Work whose task ``t`` ends in ``file(t)``; what :func:`run_tasks` runs, importable by name."""

    directory: Path

    def __call__(self, task: int, shared: dict[str, Tensor], tell: Callable[[int], None]) -> object:
        """Do a task, and write its file."""

    def name(self, task: int) -> str:
        """What to call it."""

    def found(self, task: int) -> dict[str, Tensor] | None:
        """What its file holds, see :func:`read_task`; None: it has to be done."""

    def training_folder(self, task: int) -> Path:
        """Where its model is trained; nothing is left there in the end."""

    def work(self, task: int) -> int:
        """Passes of an image through a model that it takes."""


def read_task(file: Path, wanted: dict, what: str, op: str) -> dict[str, Tensor] | None:
    """The tensors of a task's file; None where there is none, or a damaged one.

    Raises:
        ValueError: they were made otherwise than ``wanted`` says.
    """
    try:
        tensors, record = load_tensors(file)
    except (FileNotFoundError, DamagedFileError):
        return None
    differ = differences(record, wanted)
    if differ:
        raise ValueError(
            f"{op}: directory {file.parent} holds {what} that were made otherwise: {differ}; use another directory"
        )
    return tensors


def run_tasks(
    job: Tasks,
    tasks: Sequence[int],
    shared: dict[str, Tensor],
    *,
    workers: int,
    progress: Progress,
    stage: str,
    op: str,
) -> list[dict[str, Tensor]]:
    """What all tasks hold, made where it is missing.

    Args:
        shared: tensors that all tasks read.
        workers: processes, where they are more than one.
        stage: of the progress, which counts the passes of :meth:`Tasks.work`.
        op: for error messages.

    Raises:
        RuntimeError: a task failed, or a process died.
    """
    todo = [task for task in tasks if job.found(task) is None]
    job.directory.mkdir(parents=True, exist_ok=True)
    done = {task: 0 if task in todo else job.work(task) for task in tasks}
    total = sum(map(job.work, tasks))

    def tell(task: int, now: int) -> None:
        done[task] = now
        progress(sum(done.values()), total, stage)

    progress(sum(done.values()), total, stage)
    if workers > 1 and len(todo) > 1:
        in_processes(
            job,
            todo,
            shared,
            directory=job.directory,
            workers=workers,
            tell=tell,
            op=op,
            again="the same call",
            name=job.name,
        )
    else:
        for task in todo:
            job(task, shared, lambda now, task=task: tell(task, now))
    # Left by one that was killed between its last two steps.
    for task in tasks:
        shutil.rmtree(job.training_folder(task), ignore_errors=True)
    return [job.found(task) for task in tasks]


def check_between(op: str, name: str, value: int, low: int, high: int) -> None:
    """Refuse a number outside [low, high].

    Raises:
        ValueError: the message names it.
    """
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}], got {value}")
