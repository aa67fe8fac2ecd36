"""`pyattr evaluate lds build`: a folder with ground truth and all that scores need to be judged by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import diffusion
from ..datasets import ImageDataset
from ..diffusion.members import Recipe, training_options
from ..diffusion.storage import data_hash, differences
from ..evaluation import GroundTruth, build_ground_truth, subsets
from ..evaluation.ground_truth import image_hashes
from ..evaluation.retrained import QueryLosses
from ..evaluation.subset_models import recipe_settings
from .lds_table import IMAGES, QUERIES
from .options import DataOptions, Machine, TrainOptions
from .run import session
from .stages import SCHEDULE, Step, check_fits, queries_of_data, write_npz
from .workspace import Workspace, WorkspaceError, write_json


@dataclass(frozen=True)
class GroundTruthOptions:
    """See :func:`pyattr.evaluation.subsets` and :func:`pyattr.evaluation.build_ground_truth`."""

    subsets: int = 48
    seeds: int = 2
    fraction: float = 0.5
    pool: str = "evaluation"
    timesteps: int = 100
    num_noises: int = 1
    workers: int = 1


class _Building(Step):
    """Trains on the subsets; each model's losses are kept as they come, and more models may be asked for later."""

    def __init__(self, workspace: Workspace, settings: dict, options: GroundTruthOptions, detail: str, parameters: int):
        self.total = options.subsets * options.seeds
        # What a training keeps, for each worker: weights, two moments and perhaps an average, twice while it is written.
        size = 4 * 4 * parameters * 2 * options.workers
        super().__init__("Ground truth", detail, workspace.stage(f"ground-truth-{options.pool}", settings), size)

    @property
    def status(self) -> str:
        """How many models there are."""
        there_are = len(list(self.stage.folder.glob("losses-*.safetensors")))
        return f"{min(there_are, self.total)} of {self.total} models found" if there_are else "to do"


def build(
    out: Path,
    data: DataOptions,
    queries: Mapping[str, DataOptions],
    options: GroundTruthOptions,
    training: TrainOptions,
    machine: Machine,
) -> None:
    """Make or finish the ground truth of an output folder."""
    with session(out, machine) as work:
        images = work.load(data)
        asked = {name: queries_of_data(work.load(source), images).images for name, source in queries.items()}
        stacked = np.concatenate(list(asked.values()))
        check_fits(training.network, images.shape)
        recipe = {
            name: value
            for name, value in dataclasses.asdict(training).items()
            if name not in ("network", "dropout", "seed")
        }
        trained = Recipe(
            training.network, SCHEDULE, training_options(recipe, training.seed, "train"), training.seed, "train"
        )
        masks = _masks(images, options, training.seed)
        with torch.device("meta"):  # only to count, and to fail before the work
            network = diffusion.unet(training.network, channels=images.shape[0], size=images.shape[1])
        parameters = sum(p.numel() for p in network.parameters())
        taken = {name: getattr(options, name) for name in ("timesteps", "num_noises")}
        step = _Building(
            work.workspace,
            {
                "data": images.fingerprint(),
                "labels": None if images.labels is None else images.labels.tolist(),
                "queries": dataclasses.replace(images, images=stacked).fingerprint(),
                "fraction": options.fraction,
                **taken,
                **dataclasses.asdict(training),
            },
            options,
            f"{options.subsets} subsets of {masks[0].sum():,} images, {options.seeds} models of {training.network} "
            f"({parameters:,} parameters) each, {training.steps:,} steps of {training.batch_size} images; "
            f"losses of {len(stacked):,} queries at {options.timesteps} timesteps",
            parameters,
        )
        path = work.workspace.folder / f"{options.pool}.safetensors"
        _check_found(path, images, stacked, masks, options.seeds, recipe_settings(trained, QueryLosses(**taken)))
        _write_queries(work.workspace.folder, images, asked)
        work.plan([step])
        work.begin(step)
        with step.stage.work():
            truth = build_ground_truth(
                step.stage.folder,
                training.network,
                torch.from_numpy(images.images),
                torch.from_numpy(stacked),
                masks,
                schedule=SCHEDULE,
                seeds=options.seeds,
                seed=training.seed,
                workers=options.workers,
                device=work.device,
                progress=work.display.progress,
                **taken,
                **recipe,
            )
        truth.save(path)
        spread = truth.outputs().std(0).mean() / truth.outputs().mean()
        work.display.say(f"done; losses of a query vary by {spread:.1%} between subsets")
        work.display.say(f"ground truth  {path}")


def _masks(images: ImageDataset, options: GroundTruthOptions, seed: int) -> np.ndarray:
    kept = int(options.fraction * len(images)) if 0 < options.fraction < 1 else 0
    if not 1 <= kept < len(images):
        raise WorkspaceError(
            f"--fraction must leave a part of the {len(images):,} training images, got {options.fraction:g}"
        )
    return subsets(
        len(images), options.subsets, fraction=options.fraction, labels=images.labels, pool=options.pool, seed=seed
    )


def _check_found(
    path: Path, images: ImageDataset, queries: np.ndarray, masks: np.ndarray, seeds: int, recipe: dict
) -> None:
    """Refuse to replace a ground truth by one that is made otherwise or of fewer models; by more of the same is meant.

    Raises:
        WorkspaceError: the message says what differs.
        DamagedFileError, ValueError: what lies there cannot be read.
    """
    if not path.exists():
        return
    made = GroundTruth.open(path)
    known = made.images == data_hash(torch.from_numpy(images.images))
    if not known or made.queries != tuple(image_hashes(torch.from_numpy(queries))):
        raise WorkspaceError(f"{path.parent} holds the ground truth of other images or queries: choose another folder")
    (count, _), there_are = made.masks.shape, made.losses.shape[2]
    common = min(count, len(masks))
    differ = differences(
        {
            **{name: made.settings.get(name) for name in recipe},
            "images of a subset": int(made.masks[0].sum()),
            "subsets": count,
            "seeds": there_are,
        },
        {**recipe, "images of a subset": int(masks[0].sum()), "subsets": common, "seeds": min(there_are, seeds)},
    )
    if not differ and not np.array_equal(made.masks[:common], masks[:common]):
        differ = "its subsets are others, drawn by other labels"
    if differ:
        raise WorkspaceError(f"{path} was made otherwise: {differ}; choose another folder")


def _write_queries(folder: Path, images: ImageDataset, asked: Mapping[str, np.ndarray]) -> None:
    """The images, and which rows are which queries; refused when the folder holds others."""
    ends = np.cumsum([len(group) for group in asked.values()]).tolist()
    ranges = {name: [end - len(group), end] for (name, group), end in zip(asked.items(), ends, strict=True)}
    arrays = {"train_images": images.images, **{f"{name}_images": group for name, group in asked.items()}}
    if (folder / IMAGES).exists():
        with np.load(folder / IMAGES) as found:
            # Their order too: it is that of the queries in the ground truth that lies there.
            same = found.files == list(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)
        if not same:
            raise WorkspaceError(f"{folder} holds the ground truth of other images or queries: choose another folder")
    else:
        write_npz(folder / IMAGES, arrays)
    write_json(folder / QUERIES, ranges)
