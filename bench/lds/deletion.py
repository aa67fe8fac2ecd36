"""What becomes of generated images when a model is trained again without the training images that a method names."""

from pathlib import Path

import numpy as np
import torch

from pyattr.attribution import readout
from pyattr.diffusion import Progress, checkpoints, load_model, sample
from pyattr.evaluation import Counterfactuals, Scores, counterfactual
from pyattr.report.counterfactual import effects_plot, images_grid

from . import build
from . import problem as settings
from .problem import SCHEDULE, Problem

QUERIES, REMOVED = 6, 200
# By file of scores: a query's largest are removed.
SIGNED = {
    "TRAK": "trak-10-tuned",
    "D-TRAK": "d-trak-10-tuned",
    "raw pixel, cosine": "raw-pixel-cosine",
}
SQUARED = ("D-TRAK",)
RESULT = "deletion.safetensors"


def remove(problem: Problem, work: Path, workers: int, progress: Progress) -> None:
    """Retrain and keep the outcome; made again, it goes on where it was interrupted.

    The queries are the first generated ones, made again by the model in full precision, whose float16 weights gave the scores.
    """
    images = torch.from_numpy(build.images(problem)["train_images"])
    model = load_model(checkpoints(work / "main")[settings.FULL_STEPS])
    queries = sample(model, SCHEDULE, num_images=QUERIES, seed=settings.SEED, progress=progress)
    found = counterfactual(
        work / "deletion",
        problem.network,
        images,
        queries,
        scores(problem),
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


def scores(problem: Problem) -> dict[str, np.ndarray]:
    """By method, [QUERIES, N], from the committed files."""
    found = {}
    for name, stem in SIGNED.items():
        kept = Scores.open(problem.folder / "scores" / f"{stem}.safetensors").matrix
        first = len(kept) - settings.GENERATED  # generated queries come last
        found[name] = kept[first : first + QUERIES]
        if name in SQUARED:
            found[f"{name}, squared"] = readout(torch.from_numpy(found[name]), "squared").numpy()
    return found


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
