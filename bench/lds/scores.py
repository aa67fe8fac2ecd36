"""Files of scores: every method for the queries of a problem, as it comes, and with the best lambda of other queries."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyattr.diffusion import Progress
from pyattr.diffusion.storage import tensors_hash
from pyattr.evaluation import GroundTruth, Scores, tune_on_split
from pyattr.evaluation.scoreboard import other_settings

from . import methods
from . import problem as settings
from .methods import Found, Materials
from .problem import Problem

TUNED = "tuned on other queries"
GROUPS = ("validation", "generated")


def parts() -> tuple[slice, slice]:
    """Where validation images and generated ones, the groups, stand among the queries."""
    last = settings.VALIDATION + settings.GENERATED
    return slice(0, settings.VALIDATION), slice(settings.VALIDATION, last)


def write(problem: Problem, work: Path, groups: list[str], progress: Progress) -> None:
    """Compute the scores of some groups of methods and keep a file of each; what is there is made again.

    Args:
        groups: "similarity", "patches", "changes", "retrained", or a number of timesteps: the methods of gradients.
    """
    materials = Materials(problem, work, progress)
    materials.work.mkdir(parents=True, exist_ok=True)
    truth = GroundTruth.open(problem.folder / "evaluation.safetensors")
    folder = problem.folder / "scores"
    folder.mkdir(exist_ok=True)
    for group in groups:
        for found in _methods(materials, group):
            stem = _file_name(found.name) + (f"-{group}" if group.isdigit() else "")
            queries, told = materials.queries[found.queries], dict(found.settings)
            kinds = {"": (found.scores, told, {})}
            if found.grid is not None:
                matrix, choice = tuned_scores(found, truth)
                others = other_settings(told, "lambda")
                kinds["-tuned"] = (matrix, {**others, **tuned_by(truth)}, {"lambda": choice})
            for ending, (scores, record, choices) in kinds.items():
                name = found.name + (", tuned" if ending else "")
                more = {"signed": found.signed, "settings": record, "pool": found.pool, "tuned": choices}
                kept = Scores.of(name, scores, materials.images, queries, **more)
                kept.save(folder / f"{stem}{ending}.safetensors")


def tuned_by(truth: GroundTruth) -> dict:
    """What is told of scores at lambdas that a ground truth chose."""
    return {"lambda": TUNED, "truth": truth_hash(truth)}


def truth_hash(truth: GroundTruth) -> str:
    """Tells numbers that rest on these losses from those of an older ground truth."""
    return tensors_hash({"losses": torch.from_numpy(truth.losses)})[:16]


def tuned_scores(found: Found, truth: GroundTruth) -> tuple[Tensor, dict]:
    """The scores of half of the validation (or generated) queries at the lambda that is best for the other half, [Q, N].

    Returns:
        The scores, and what was chosen as :attr:`pyattr.evaluation.Scores.tuned` tells it of a setting.
    """
    outputs = truth.outputs()[:, found.queries]
    rows = np.arange(truth.losses.shape[4])[found.queries]
    scores = torch.empty_like(found.scores)
    choice: dict = {"grid": [], "chosen": {}}
    for group, part in zip(GROUPS, parts(), strict=True):
        inside = np.isin(rows, np.arange(len(truth.query_ids))[part])
        if not inside.any():
            continue
        grid = ((value, matrix[torch.from_numpy(inside)]) for value, matrix in found.grid())
        tuned = tune_on_split(grid, truth.masks, outputs[:, inside])
        choice["grid"], choice["chosen"][group] = list(tuned.curve), list(tuned.chosen)
        for value, matrix in found.grid():
            for fold, best in enumerate(tuned.chosen):
                if value == best:
                    mine = np.flatnonzero(inside)[tuned.folds == fold]
                    scores[mine] = matrix[mine]
    return scores, choice


def _methods(materials: Materials, group: str) -> Iterator[Found]:
    if group == "similarity":
        return methods.similarities(materials)
    if group == "patches":
        return methods.patches(materials)
    if group == "changes":
        return methods.changes(materials)
    if group == "retrained":
        return methods.retrained(materials)
    return methods.of_gradients(materials, int(group))


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
