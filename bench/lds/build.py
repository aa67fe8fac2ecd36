"""The ground truth: models of all images and of halves of them, and the losses of the queries under each."""

import shutil
from pathlib import Path

import numpy as np
import torch

from pyattr.diffusion import Progress, checkpoints, load_model, sample, save_model, train
from pyattr.diffusion.images import to_bytes
from pyattr.evaluation import GroundTruth, build_ground_truth
from pyattr.files import whole_file

from . import problem as settings
from .problem import SCHEDULE, Problem

MODELS = "models"


def images(problem: Problem) -> dict[str, np.ndarray]:
    """The images of the problem, from its folder."""
    with np.load(problem.folder / "images.npz") as found:
        return dict(found)


def draw(problem: Problem, source: Path) -> None:
    """Choose the images and keep them."""
    problem.folder.mkdir(exist_ok=True)
    with whole_file(problem.folder / "images.npz") as stream:
        np.savez_compressed(stream, **problem.draw(source))


def main_model(problem: Problem, work: Path, progress: Progress) -> None:
    """Train on all images, keep four checkpoints in float16, and generate the queries from the last of them.

    Scores, samples and losses start from the committed weights, so that anyone can make them again.
    """
    found = images(problem)
    torch.manual_seed(settings.SEED)
    folder = problem.folder / MODELS
    folder.mkdir(exist_ok=True)
    train(
        problem.network(),
        torch.from_numpy(found["train_images"]),
        schedule=SCHEDULE,
        steps=settings.FULL_STEPS,
        checkpoint_every=settings.FULL_STEPS // 4,
        keep_checkpoints=None,
        checkpoint_directory=work / "main",
        seed=settings.SEED,
        progress=progress,
        **settings.TRAINING,
    )
    for step, path in checkpoints(work / "main").items():
        save_model(folder / f"main-{step:04d}.safetensors", load_model(path), schedule=SCHEDULE, dtype=torch.float16)
    with whole_file(problem.folder / "images.npz") as stream:
        made = to_bytes(sampled(problem, "noise", progress).images).numpy()
        np.savez_compressed(stream, **{**found, "generated_images": made})


def main_checkpoints(problem: Problem) -> list[Path]:
    """Of the model of all images, at a quarter of the training, half, three quarters, and its end."""
    return sorted((problem.folder / MODELS).glob("main-*.safetensors"))


def half_models(problem: Problem) -> list[Path]:
    """Of the models of halves of the images that methods learn from, those that are kept."""
    return sorted((problem.folder / MODELS).glob("half-*.safetensors"))


def sampled(problem: Problem, record: str, progress: Progress):
    """The generated queries as Samples, made by the committed model of all images."""
    model = load_model(main_checkpoints(problem)[-1])
    return sample(model, SCHEDULE, num_images=settings.GENERATED, record=record, seed=settings.SEED, progress=progress)


def queries(problem: Problem) -> torch.Tensor:
    """Validation images, then generated ones: [200, C, 16, 16] uint8."""
    found = images(problem)
    return torch.from_numpy(np.concatenate([found["validation_images"], found["generated_images"]]))


def retrain(
    problem: Problem, pool: str, work: Path, workers: int, progress: Progress, timesteps: int | None = None
) -> GroundTruth:
    """Train on the subsets and keep the losses: "evaluation", or "retraining", of which four networks are kept too.

    Args:
        timesteps: evenly spaced ones that losses are means over. Of another number than the benchmark's the outcome lies in a
            file that is named by it, and so do the losses of each model: what the tables rest on stays.
    """
    found = images(problem)
    evaluation = pool == "evaluation"
    other = timesteps is not None and timesteps != settings.TIMESTEPS
    name = f"{pool}-{timesteps}" if other else pool
    truth = build_ground_truth(
        work / name,
        problem.network,
        torch.from_numpy(found["train_images"]),
        queries(problem),
        problem.masks(found["train_labels"], pool),
        schedule=SCHEDULE,
        seeds=problem.seeds if evaluation else 1,
        timesteps=timesteps if other else settings.TIMESTEPS,
        seed=settings.SEED if evaluation else settings.SEED + 1,
        steps=settings.SUBSET_STEPS,
        keep_models=not evaluation and not other,  # they would be the same
        workers=workers,
        progress=progress,
        **settings.TRAINING,
    )
    truth.save(problem.folder / f"{name}.safetensors")
    if not evaluation and not other:
        for member in range(settings.MEMBERS):
            model = f"model-{member:04d}-00.safetensors"
            shutil.copyfile(work / pool / "models" / model, problem.folder / MODELS / f"half-{member}.safetensors")
    return truth
