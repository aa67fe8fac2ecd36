"""Counterfactual retraining: what becomes of a sample when the images that a method names were never there."""

import dataclasses
import hashlib
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.checkpoint import checkpoints, identity, load_model
from ..diffusion.images import as_images, evaluating
from ..diffusion.members import PACE, Recipe, check_importable, check_model, training_options
from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import Samples, sample
from ..diffusion.schedule import Schedule
from ..diffusion.storage import data_hash, differences, load_record, save_tensors, tensors_hash
from .counterfactual_results import Counterfactuals
from .removal import RANDOM, checked_scores, random_scores, strongest
from .retrained import TARGETS, TRAINING_PASSES, QueryLosses, check_between, read_task, run_tasks

RESULT = "counterfactuals.safetensors"
ORIGINAL = -1  # the task of training on all images
_SAMPLING = ("method", "steps", "eta", "seed", "clip")
_OP = "counterfactual"


@dataclass(frozen=True)
class _Recipe(Recipe):
    """One whose models all have the same seeds, those of the model that is asked about."""

    initial_seed: int = 0

    def seeds(self, number: int) -> tuple[int, int]:
        return self.initial_seed, self.seed


@dataclass(frozen=True)
class _Plan:
    """All that a process has to know to retrain; task i is to lose the images ``removed[i]`` for the queries ``rows[i]``."""

    recipe: _Recipe
    losses: QueryLosses
    removed: np.ndarray  # [K, N] bool
    rows: tuple[tuple[int, ...], ...]  # K
    directory: Path
    settings: dict
    queries: tuple[str, ...]  # Q, what identifies each with its id
    shape: tuple[int, int, int]

    @property
    def sampling(self) -> dict:
        return self.settings["sampling"]

    def name(self, task: int) -> str:
        return "the model of all images" if task == ORIGINAL else f"model {task}"

    def _rows(self, task: int) -> tuple[int, ...]:
        return tuple(range(len(self.queries))) if task == ORIGINAL else self.rows[task]

    def _key(self, task: int) -> str:
        removed = np.zeros(0) if task == ORIGINAL else self.removed[task]
        told = "".join(self.queries[row] for row in self._rows(task)).encode()
        return hashlib.sha256(np.packbits(removed.astype(bool)).tobytes() + told).hexdigest()[:16]

    def file(self, task: int) -> Path:
        return self.directory / f"retrained-{self._key(task)}.safetensors"

    def training_folder(self, task: int) -> Path:
        return self.directory / f"training-{self._key(task)}"

    def found(self, task: int) -> dict[str, Tensor] | None:
        return read_task(self.file(task), self.settings, "retrained models' samples", _OP)

    def work(self, task: int) -> int:
        queries = len(self._rows(task))
        losses = queries * self.losses.timesteps * self.losses.num_noises
        return self._training() + losses + (0 if task == ORIGINAL else queries * self.sampling["steps"])

    def _training(self) -> int:
        return self.recipe.training["steps"] * self._step()

    def _step(self) -> int:
        return self.recipe.training["batch_size"] * TRAINING_PASSES

    def __call__(self, task: int, shared: dict[str, Tensor], tell: Callable[[int], None]) -> None:
        """Train a model, make its samples and take its losses, and keep them."""
        images, folder = shared["images"], self.training_folder(task)
        if task != ORIGINAL:
            images = images[torch.from_numpy(~self.removed[task]).to(images.device)]
        model = self.recipe.train(0, images, folder, lambda done, _total, _stage: tell(done * self._step()))
        save_tensors(self.file(task), self.of(model, task, shared, tell), self.settings)
        shutil.rmtree(folder)

    def of(
        self, model: nn.Module, task: int, shared: dict[str, Tensor], tell: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """What the file of a task holds: the losses [F, E, q] of its queries, and their samples; of the original, its weights'
        hash in place of them."""
        done, losses, samples = self._training(), [], []
        for row in self._rows(task):
            # One by one, so that no query's bits depend on which others had their model in common with it.
            one = slice(row, row + 1)
            ids, begin = shared["ids"][one], done
            with evaluating(model):
                losses.append(
                    self.losses(
                        model,
                        self.recipe.schedule,
                        shared["queries"][one],
                        ids,
                        lambda now, begin=begin: tell(begin + now),
                    )
                )
            done += self.losses.timesteps * self.losses.num_noises
            if task != ORIGINAL:
                made = sample(model, self.recipe.schedule, ids=ids, shape=self.shape, **self.sampling)
                samples.append(made.images)
                done += self.sampling["steps"]
            tell(done)
        found = {"losses": torch.cat(losses, 2)}
        if task == ORIGINAL:
            told = json.dumps(identity(model), sort_keys=True).encode()
            return found | {"identity": torch.frombuffer(bytearray(told), dtype=torch.uint8)}
        return found | {"images": torch.cat(samples)}


def counterfactual(
    directory: str | os.PathLike,
    model: Callable[[], nn.Module] | str,
    images,
    queries: Samples,
    scores: Mapping,
    *,
    schedule: Schedule,
    remove: int | Sequence[int],
    together: bool = False,
    seed: int = 0,
    initial_seed: int | None = None,
    reference: str | os.PathLike | None = None,
    control_seed: int = 0,
    timesteps: int = 100,
    num_noises: int = 1,
    targets: tuple[str, ...] = TARGETS,
    noise_seed: int = 0,
    rows_per_pass: int = 256,
    workers: int = 1,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    **training,
) -> Counterfactuals:
    """Retrain without the training images that methods hold responsible for a sample, and make the sample again.

    For each method, query q and number m: the m images of the largest scores of q (of equal ones the first) are taken away, a
    model is trained on the others by the same recipe from the same seeds, and the sample is made again from the same noise; so
    are its losses. Beside the methods stands a control that takes m images at random for each query; those of a larger m hold
    those of a smaller one.

    As many optimiser steps are done with the images that are left as with all. Of a method whose scores are magnitudes the
    largest are removed; to compare the removal by squares with that by signed scores, pass both:
    ``{"TRAK": t, "TRAK squared": pyattr.attribution.readout(t, "squared")}``.

    What was retrained and sampled lies in a file for each model, whole or not at all; a call that is made again after it was
    killed ends at the same bits, and methods, numbers, queries and controls may be added to a directory. A model that several
    are to have (the same images, for the same queries) is trained once.

    Args:
        directory: where all of it lies; created when it is missing.
        model: builds the network that made the queries, without arguments, from torch's random state; or a preset of
            :func:`pyattr.diffusion.unet`.
        images: the training images, [N, C, H, W] uint8, or floating point in [-1, 1].
        queries: :class:`~pyattr.diffusion.Samples` of the model that the recipe trains on all images, on this machine.
        scores: names of methods to [Q, N] scores, the larger the sooner removed; no NaN.
        schedule: of the diffusion.
        remove: m, or several, in [1, N).
        together: one set of images for all queries, by the sum of their scores, and one at random: a model for each method
            instead of one for each method and query.
        seed: of the training of the model that made the queries, see :func:`pyattr.diffusion.train`.
        initial_seed: of torch's random state when that model was built; None: ``seed``.
        reference: the ``checkpoint_directory`` of that training; None: it is done again first, to compare.
        control_seed: of the control, in [0, 2^32).
        timesteps, num_noises, targets, noise_seed, rows_per_pass: of the losses, see
            :func:`~pyattr.evaluation.build_ground_truth`; the noise is a function of the queries' ids.
        workers: processes that work side by side, with as many threads each as torch has here. The model must then be
            importable by name.
        device: where models are trained; None: where the factory makes them.
        progress: stage "retraining".
        training: options of :func:`pyattr.diffusion.train`, those of the model that made the queries.

    Returns:
        :class:`Counterfactuals`, which also lies in ``counterfactuals.safetensors``. A difference includes what training on
        other images does in any case: it is to be compared with the control's.

    Raises:
        TypeError, ValueError: an argument is not as above, the queries are of another model than the recipe's, or the
            directory was made otherwise.
        RuntimeError: training failed, or a process died; what is done is kept.

    Extra memory: for each worker its images, that of :func:`pyattr.diffusion.train` and of one image's sampling; the result,
    with A R Q N bytes; the scores in float64.

    Source: the counterfactual evaluation of Zheng et al., ICLR 2024 (D-TRAK), and of NDA: 1,000 images removed, 60 samples.
    """
    images = as_images(images, _OP, "images")
    if not isinstance(queries, Samples):
        raise TypeError(f"{_OP}: queries must be Samples, which know their noise, got {type(queries).__name__}")
    if queries.images.shape[1:] != images.shape[1:] or len(queries) == 0:
        raise ValueError(
            f"{_OP}: queries must be at least one image of shape {list(images.shape[1:])}, got {list(queries.images.shape)}"
        )
    scores = checked_scores(scores, len(queries), len(images), _OP)
    counts = tuple(map(operator.index, remove if isinstance(remove, Iterable) else (remove,)))
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"{_OP}: remove must be distinct numbers, and one at least, got {counts}")
    for count in counts:
        check_between(_OP, "remove", count, 1, len(images) - 1)
    initial_seed = seed if initial_seed is None else initial_seed
    for name, value in (("initial_seed", initial_seed), ("control_seed", control_seed)):
        check_between(_OP, name, value, 0, 2**32 - 1)
    check_between(_OP, "workers", workers, 1, 2**10)
    losses = QueryLosses(timesteps, num_noises, noise_seed, tuple(targets), rows_per_pass)
    losses.check(schedule, _OP)
    check_model(model, _OP)
    options = training_options(training, seed, _OP)
    if options["checkpoint_every"] is None:
        options["checkpoint_every"] = options["steps"]
    made = queries.settings
    if made.get("schedule") != dataclasses.asdict(schedule):
        raise ValueError(f"{_OP}: schedule must be that of the queries, {made.get('schedule')}, got {schedule}")
    recipe = _Recipe(model, schedule, options, seed, _OP, device, initial_seed)
    if workers > 1:
        check_importable(recipe)
    shape = tuple(images.shape[1:])
    start = identity(recipe.build(0, shape))
    trained = {name: value for name, value in options.items() if name not in PACE}
    settings = {
        "kind": "retrained",
        "model": model if isinstance(model, str) else None,
        "initial": start,
        "schedule": dataclasses.asdict(schedule),
        "training": {**trained, "seed": seed},
        "losses": dataclasses.asdict(losses),
        "sampling": {name: made[name] for name in _SAMPLING},
        "images": data_hash(images),
    }
    methods, removed = _removed(scores, counts, queries.ids.numpy(), together, control_seed)  # [A, R, Q, N]
    sets, rows, place = _distinct(removed)
    known = tuple(tensors_hash({"image": x, "id": i}) for x, i in zip(queries.images, queries.ids, strict=True))
    plan = _Plan(recipe, losses, sets, rows, Path(directory), settings, known, shape)
    shared = {"images": images, "queries": queries.images, "ids": queries.ids}
    if reference is not None:
        original = _read_reference(plan, reference, shared, trained, made, progress)
    else:
        (original,) = run_tasks(plan, [ORIGINAL], shared, workers=1, progress=progress, stage="original", op=_OP)
        told = json.loads(original["identity"].numpy().tobytes())
        what = (
            "the recipe trains another model on all images than the one that made the queries (where machines or numbers of "
            "threads may differ, give reference)"
        )
        _check_made_by(made, told, what)
    found = run_tasks(plan, range(len(sets)), shared, workers=workers, progress=progress, stage="retraining", op=_OP)
    outcome = Counterfactuals(
        methods=methods,
        remove=counts,
        ids=queries.ids,
        originals=queries.images,
        images=_placed([one["images"] for one in found], place, rows, removed.shape[:3]),
        targets=losses.targets,
        original_losses=original["losses"],
        losses=_placed([one["losses"].movedim(2, 0) for one in found], place, rows, removed.shape[:3]).movedim(2, 4),
        removed=torch.from_numpy(removed),
        retrained=len(sets),
        # As a file gives them back.
        settings=json.loads(json.dumps({**settings, "together": together, "control seed": control_seed})),
    )
    outcome.save(plan.directory / RESULT)
    return outcome


def _removed(
    scores: dict[str, np.ndarray], counts: tuple[int, ...], ids: np.ndarray, together: bool, control_seed: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the methods and the control, and which images each takes away: [A, R, Q, N] bool."""
    num_images = next(iter(scores.values())).shape[1]
    control = random_scores(ids[:1] if together else ids, num_images, control_seed)
    methods = (*scores, RANDOM)
    removed = np.zeros((len(methods), len(counts), len(ids), num_images), bool)
    for a, values in enumerate((*scores.values(), control)):
        if together:
            values = values.sum(0, keepdims=True)
        order = strongest(values, max(counts))  # [Q or 1, M]
        for r, count in enumerate(counts):
            mask = np.zeros(values.shape, bool)
            np.put_along_axis(mask, order[:, :count], True, 1)
            removed[a, r] = mask
    return methods, removed


def _distinct(removed: np.ndarray) -> tuple[np.ndarray, tuple[tuple[int, ...], ...], np.ndarray]:
    """The different sets [K, N], the queries that each is removed for, and which set is whose: [A R Q] int64."""
    flat = removed.reshape(-1, removed.shape[3])
    numbers: dict[bytes, int] = {}
    place = np.array([numbers.setdefault(np.packbits(row).tobytes(), len(numbers)) for row in flat])
    first = np.unique(place, return_index=True)[1]
    queries = np.arange(len(flat)) % removed.shape[2]
    return flat[first], tuple(tuple(np.unique(queries[place == k]).tolist()) for k in range(len(first))), place


def _placed(
    parts: list[Tensor], place: np.ndarray, rows: tuple[tuple[int, ...], ...], shape: tuple[int, int, int]
) -> Tensor:
    """[A, R, Q, ...] from what each model gave for its queries."""
    queries = shape[2]
    return torch.stack([parts[k][rows[k].index(i % queries)] for i, k in enumerate(place)]).unflatten(0, shape)


def _read_reference(
    plan: _Plan, folder: str | os.PathLike, shared: dict[str, Tensor], trained: dict, made: dict, progress: Progress
) -> dict[str, Tensor]:
    """The losses under a model that is there, once it is known to be the recipe's, and the queries' own."""
    recipe, steps = plan.recipe, plan.recipe.training["steps"]
    path = checkpoints(folder).get(steps)
    if path is None:
        raise ValueError(f"{_OP}: reference {folder} holds no checkpoint of step {steps}, the last of the recipe")
    start = {f"initial {name}": value for name, value in plan.settings["initial"].items()}
    wanted = {**trained, "seed": recipe.seed, "schedule": plan.settings["schedule"], **start}
    differ = differences(load_record(path)["settings"], {**wanted, "images": plan.settings["images"]})
    if differ:
        raise ValueError(f"{_OP}: reference {folder} holds a model that was trained by another recipe: {differ}")
    model = load_model(path, into=recipe.build(0, plan.shape))
    _check_made_by(made, identity(model), f"reference {folder} is another model than the one that made the queries")
    found = plan.found(ORIGINAL)
    if found is None:
        plan.directory.mkdir(parents=True, exist_ok=True)
        skipped = plan.work(ORIGINAL) - plan.losses.timesteps * plan.losses.num_noises * len(plan.queries)
        total = plan.work(ORIGINAL) - skipped
        found = plan.of(model, ORIGINAL, shared, lambda done: progress(done - skipped, total, "original"))
        save_tensors(plan.file(ORIGINAL), found, plan.settings)
    return found


def _check_made_by(made: dict, model: dict, what: str) -> None:
    """Refuse samples that are not the model's."""
    differ = differences({name: made.get(name) for name in model}, model)
    if differ:
        raise ValueError(f"{_OP}: {what}: {differ}")
