"""Making ground truth: models trained on subsets, and the losses of queries under each of them."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.checkpoint import identity, save_model
from ..diffusion.conditioned import Conditioned, as_examples, examples_hash, pack, unpack, with_conditions
from ..diffusion.images import evaluating
from ..diffusion.members import PACE, Recipe, check_importable, check_model, training_options
from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import Samples
from ..diffusion.schedule import Schedule
from ..diffusion.storage import data_hash, save_tensors, tensors_hash
from .ground_truth import GroundTruth, image_hashes
from .retrained import TARGETS, TRAINING_PASSES, QueryLosses, check_between, read_task, run_tasks

RESULT = "ground-truth.safetensors"
_OP = "build_ground_truth"


@dataclass(frozen=True)
class _Plan:
    """All that a process has to know to make the losses of a model; task m S + s is seed s of subset m."""

    recipe: Recipe
    evaluation: QueryLosses
    masks: np.ndarray
    seeds: int
    directory: Path
    keep_models: bool
    settings: dict
    num_queries: int

    def name(self, task: int) -> str:
        return "subset {}, seed {}".format(*divmod(task, self.seeds))

    def file(self, task: int) -> Path:
        return self.directory / "losses-{:04d}-{:02d}.safetensors".format(*divmod(task, self.seeds))

    def model_file(self, task: int) -> Path:
        return self.directory / "models" / "model-{:04d}-{:02d}.safetensors".format(*divmod(task, self.seeds))

    def training_folder(self, task: int) -> Path:
        return self.directory / "training-{:04d}-{:02d}".format(*divmod(task, self.seeds))

    def record(self, task: int) -> dict:
        """What decides the losses of a task."""
        subset, seed = divmod(task, self.seeds)
        mask = tensors_hash({"mask": torch.from_numpy(self.masks[subset])})
        initial = self.settings["initial"][seed]
        return {"kind": "losses", **self.settings, "initial": initial, "subset": mask, "model seed": seed}

    def found(self, task: int) -> dict[str, Tensor] | None:
        """The losses of a task that is done; those of a damaged file are made again.

        Raises:
            ValueError: they were made otherwise.
        """
        tensors = read_task(self.file(task), self.record(task), "losses", _OP)
        return None if self.keep_models and not self.model_file(task).is_file() else tensors

    def work(self, task: int) -> int:
        """Passes of an image through a model that a task takes."""
        images = self.recipe.training["steps"] * self.recipe.training["batch_size"]
        return images * TRAINING_PASSES + self.num_queries * self.evaluation.timesteps * self.evaluation.num_noises

    def __call__(self, task: int, shared: dict[str, Tensor], tell: Callable[[int], None]) -> None:
        """Train a model, take its losses, and keep them."""
        subset, seed = divmod(task, self.seeds)
        recipe, folder = self.recipe, self.training_folder(task)
        images = unpack(shared, "images")
        kept = images[torch.from_numpy(self.masks[subset].nonzero()[0]).to(images.device)]
        passes = recipe.training["batch_size"] * TRAINING_PASSES
        model = recipe.train(seed, kept, folder, lambda done, _total, _stage: tell(done * passes))
        trained = recipe.training["steps"] * passes
        with evaluating(model):
            losses = self.evaluation(
                model, recipe.schedule, unpack(shared, "queries"), shared["ids"], lambda done: tell(trained + done)
            )
        if self.keep_models:
            self.model_file(task).parent.mkdir(exist_ok=True)
            save_model(self.model_file(task), model, schedule=recipe.schedule, dtype=torch.float16)
        save_tensors(self.file(task), {"losses": losses}, self.record(task))
        shutil.rmtree(folder)


def build_ground_truth(
    directory: str | os.PathLike,
    model: Callable[[], nn.Module] | str,
    images,
    queries,
    masks,
    *,
    schedule: Schedule,
    seeds: int = 1,
    timesteps: int = 100,
    num_noises: int = 1,
    targets: tuple[str, ...] = TARGETS,
    query_ids=None,
    seed: int = 0,
    noise_seed: int = 0,
    rows_per_pass: int = 256,
    keep_models: bool = False,
    workers: int = 1,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    **training,
) -> GroundTruth:
    """Train models on subsets of the training images and take the losses of queries under each.

    ``losses[F, m, s, e, q] = mean over t of F(e_theta(x_t, t), eps)``, theta the weights of model seed s trained on subset m,
    ``x_t = sqrt(abar_t) x_q + sqrt(1 - abar_t) eps``, eps the same for all models: a function of (``noise_seed``, the query's
    id, t, e) that no feature, sample or patch score shares, whatever their seeds.

    Model seed s decides the initial weights, the data order and the noise of the training of every subset's s-th model, as
    in the published benchmarks. Each model's losses are kept in a file as they come, and a training that was interrupted goes
    on from its last state; so a call that is made again after it was killed ends at the same bits. More subsets or seeds may be
    added to a directory: what is there is kept.

    Args:
        directory: where all of it lies; created when it is missing.
        model: builds a network, without arguments, from torch's random state; or a preset of :func:`pyattr.diffusion.unet`.
        images: the training images, [N, C, H, W] uint8, or floating point in [-1, 1]; for conditional models
            :class:`~pyattr.diffusion.Conditioned`.
        queries: [Q, C, H, W] likewise, or :class:`~pyattr.diffusion.Samples`.
        masks: [M, N] boolean or 0 and 1, see :func:`subsets`; each subset holds an image.
        schedule: of the diffusion.
        seeds: S, models of each subset.
        timesteps: K of T, evenly spaced, each in the middle of its share: t = ((2 i + 1) T) div (2 K); T means all.
        num_noises: E, draws of the noise at each timestep.
        targets: names of the functions F, see :mod:`pyattr.diffusion.losses`.
        query_ids: [Q] distinct integers in [0, 2^63); None: those of the samples, or 0..Q-1.
        seed: of the model seeds, in [0, 2^32).
        noise_seed: in [0, 2^32).
        rows_per_pass: noisy images that go through a model together when losses are taken; decides their rounding.
        keep_models: keep the trained models with weights rounded to float16, in ``models/``.
        workers: processes that work side by side, with as many threads each as torch has here: the same bits as from one. The
            model must then be importable by name.
        device: where models are trained; None: where the factory makes them.
        progress: stage "ground truth".
        training: options of :func:`pyattr.diffusion.train`, ``steps`` at least. Of ``checkpoint_every`` the default is
            all steps: a state to go on from is kept each minute anyway.

    Returns:
        :class:`GroundTruth`, which also lies in ``ground-truth.safetensors``; float64 means of values that are computed in
        float64 from predictions in the model's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above, or the directory was made with others.
        RuntimeError: training failed, or a process died; what is done is kept.

    Extra memory: for each worker its subset's images, that of :func:`pyattr.diffusion.train`, and 8 F Q K bytes; all losses
    twice.

    Source: Zheng et al., ICLR 2024 (D-TRAK), section 4.1 (all 1,000 timesteps, three draws, three models of each subset).
    """
    images = as_examples(images, _OP, "images")
    if isinstance(queries, Samples):
        query_ids = queries.ids if query_ids is None else query_ids
        queries = with_conditions(queries.images, queries.conditions)
    queries = as_examples(queries, _OP, "queries")
    if isinstance(queries, Conditioned) != isinstance(images, Conditioned):
        raise TypeError(f"{_OP}: queries must have conditions where images have them, and only there")
    query_ids = torch.arange(len(queries)) if query_ids is None else torch.as_tensor(query_ids, dtype=torch.int64)
    if query_ids.shape != queries.shape[:1] or len(query_ids.unique()) != len(query_ids):
        raise ValueError(
            f"{_OP}: query_ids must be {len(queries)} distinct integers, got shape {list(query_ids.shape)}"
        )
    if len(queries) == 0 or queries.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"{_OP}: queries must be at least one image of shape {list(images.shape[1:])}, got {list(queries.shape)}"
        )
    masks = _as_masks(masks, len(images))
    evaluation = QueryLosses(timesteps, num_noises, noise_seed, tuple(targets), rows_per_pass)
    evaluation.check(schedule, _OP)
    for name, value, high in (("seeds", seeds, 99), ("workers", workers, 2**10)):
        check_between(_OP, name, value, 1, high)
    check_model(model, _OP)
    options = training_options(training, seed, _OP)
    if options["checkpoint_every"] is None:
        options["checkpoint_every"] = options["steps"]
    recipe = Recipe(model, schedule, options, seed, _OP, device)
    if workers > 1:
        check_importable(recipe)
    mirrored = images.mirrored if options["flip"] and isinstance(images, Conditioned) else None
    hashes = tuple(image_hashes(queries))
    settings = {
        **recipe_settings(recipe, evaluation),
        "initial": [identity(recipe.build(s, tuple(images.shape[1:]))) for s in range(seeds)],
        "images": examples_hash(images),
        "queries": tensors_hash({**pack(queries, "queries"), "ids": query_ids}),
        **({} if mirrored is None else {"mirrored": data_hash(mirrored)}),
    }
    directory = Path(directory)
    plan = _Plan(recipe, evaluation, masks, seeds, directory, keep_models, settings, len(queries))
    shared = {**pack(images, "images"), **pack(queries, "queries"), "ids": query_ids}
    tasks = range(len(masks) * seeds)
    found = run_tasks(plan, tasks, shared, workers=workers, progress=progress, stage="ground truth", op=_OP)
    made = GroundTruth(
        masks=masks,
        losses=np.stack([one["losses"].numpy() for one in found], 1).reshape(
            len(evaluation.targets), len(masks), seeds, num_noises, -1
        ),
        targets=evaluation.targets,
        query_ids=query_ids.numpy(),
        images=settings["images"],
        queries=hashes,
        # As a file gives them back.
        settings=json.loads(
            json.dumps({name: settings[name] for name in settings if name not in ("images", "queries")})
        ),
    )
    made.save(directory / RESULT)
    return made


def recipe_settings(recipe: Recipe, evaluation: QueryLosses) -> dict:
    """What the settings of a ground truth say of how its models are trained and their losses taken, before any is built."""
    return {
        "model": recipe.model if isinstance(recipe.model, str) else None,
        "schedule": dataclasses.asdict(recipe.schedule),
        "training": {name: value for name, value in recipe.training.items() if name not in PACE},
        "seed": recipe.seed,
        "evaluation": dataclasses.asdict(evaluation),
    }


def _as_masks(masks, num_images: int) -> np.ndarray:
    masks = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
    if masks.ndim != 2 or len(masks) == 0 or masks.shape[1] != num_images:
        raise ValueError(
            f"{_OP}: masks must have shape [M, N] with M at least 1 and N = {num_images}, got {list(masks.shape)}"
        )
    if not np.isin(masks, (0, 1)).all():
        raise ValueError(f"{_OP}: masks must be 0 or 1, got {masks[~np.isin(masks, (0, 1))][0]:g}")
    masks = masks.astype(bool)
    if not masks.any(1).all():
        raise ValueError(f"{_OP}: masks must leave each model an image, got none for subset {masks.any(1).argmin()}")
    return masks
