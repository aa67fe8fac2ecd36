"""What becomes of generated images when a model is trained again without the training images that a method names."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pyattr.attribution import DTRAK, TRAK, RawPixel, readout
from pyattr.diffusion import Progress, Samples, checkpoints, load_model, sample
from pyattr.evaluation import Counterfactuals, counterfactual
from pyattr.report.counterfactual import effects_plot, images_grid

from . import build
from . import problem as settings
from .methods import DIM, FEW
from .problem import SCHEDULE, Problem

METHODS = {"TRAK": TRAK, "D-TRAK": DTRAK}
QUERIES, REMOVED = 6, 200
SQUARED = ("D-TRAK",)
RESULT = "deletion.safetensors"


def remove(problem: Problem, work: Path, workers: int, progress: Progress) -> None:
    """Retrain and keep the outcome; made again, it goes on where it was interrupted.

    Reference, queries and scores are of a model of all images that the stage "main" trained on this machine, in full precision:
    the same training on another machine ends at other weights, from which no single removal could be told.
    """
    images = torch.from_numpy(build.images(problem)["train_images"])
    model = load_model(checkpoints(work / "main")[settings.FULL_STEPS]).eval()
    queries = sample(model, SCHEDULE, num_images=QUERIES, seed=settings.SEED, progress=progress)
    found = counterfactual(
        work / "deletion",
        problem.network,
        images,
        queries,
        scores(model, images, queries, work / "features", progress),
        schedule=SCHEDULE,
        remove=REMOVED,
        seed=settings.SEED,
        reference=work / "main",
        timesteps=settings.TIMESTEPS,
        noise_seed=settings.SEED,
        workers=workers,
        progress=progress,
        steps=settings.FULL_STEPS,
        **settings.TRAINING,
    )
    found.save(problem.folder / RESULT)


def scores(
    model: nn.Module, images: Tensor, queries: Samples, features: Path, progress: Progress
) -> dict[str, Tensor]:  # [Q, N] each
    """By method, at 10 timesteps and the automatic lambda, which no retrained model has chosen."""
    options = {"num_timesteps": FEW, "proj_dim": DIM, "batch_size": 32, "progress": progress}
    found = {
        name: kind(model, SCHEDULE, directory=features / f"deletion-{name}", **options)
        .fit(images)
        .scores(queries.images)
        for name, kind in METHODS.items()
    }
    for name in SQUARED:
        found[f"{name}, squared"] = readout(found[name], "squared")
    return {**found, "raw pixel, cosine": RawPixel("cosine").fit(images).scores(queries.images)}


def table(problem: Problem) -> str:
    """Medians over the queries with their intervals, and in how many queries a method did more than the control."""
    path = problem.folder / RESULT
    if not path.exists():
        return ""
    found = Counterfactuals.open(path)
    effects = (found.l2, found.loss_change())
    lines = ["| removed by | L2 | above random | change of the loss, thousandths | above random |"]
    lines.append("|---|---:|---:|---:|---:|")
    for method in found.methods:
        cells = []
        for effect, scale in zip(effects, (1, 1e3), strict=True):
            low, high = effect.interval(method)
            cells.append(f"{scale * effect.median(method):.2f} ({scale * low:.2f} to {scale * high:.2f})")
            above = int((effect.of(method) > effect.of(found.methods[-1])).sum())
            cells.append("–" if method == found.methods[-1] else f"{above} of {len(found.ids)}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pictures(problem: Problem, folder: Path) -> None:
    """Each query's numbers, and the images before and after."""
    path = problem.folder / RESULT
    if path.exists():
        found = Counterfactuals.open(path)
        effects_plot(folder / f"deletion-{problem.name}.png", [found.l2, found.loss_change()])
        images_grid(folder / f"deletion-{problem.name}-images.png", found)
