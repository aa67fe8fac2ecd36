"""Whether a recipe of training is smooth enough in the weights of its items for derivatives to foretell removals."""

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...diffusion.progress import Progress, silent
from .replay import Replay, settings_of
from .rows import as_rows, take
from .schemes import Scheme
from .training import Adam, Loss, WeightedTraining, check_numbers, check_weights

_DIRECTION, _HELD = 0x6D646972, 0x6D68656C  # key word 1 of the direction, and of the draws of the final loss


@dataclass(frozen=True)
class Recipe:
    """What of a training may be chosen.

    Args:
        steps, batch_size, optimiser: see :class:`~pyattr.attribution.MAGIC`, which takes them as
            ``MAGIC(model, loss, phi, **recipe.settings)``.
    """

    steps: int
    batch_size: int
    optimiser: Adam = field(default_factory=Adam)

    @property
    def settings(self) -> dict:
        """By name."""
        return {"steps": self.steps, "batch_size": self.batch_size, "optimiser": self.optimiser}


@dataclass(frozen=True)
class Smoothness:
    """How evenly a training responds to its weights.

    Attributes:
        recipe: the training.
        value: in [-1, 1]: 1 if each parameter moves on in the direction in which it began to move.
        linearity: the cosine between the first half of the way and the second: 1 if derivatives foretell the whole of it.
        change: how far the parameters moved from w = 1 to w = 1 + 2 h v, relative to their way from the start of training.
        loss: the mean loss of the items at the end of training with w = 1, over fixed draws; infinite if training diverged.
    """

    recipe: Recipe
    value: float
    linearity: float
    change: float
    loss: float


def metasmoothness(
    model: nn.Module,
    loss: Loss,
    train,
    recipe: Recipe,
    *,
    h: float = 0.1,
    seed: int = 0,
    direction: Tensor | None = None,
    directory: str | os.PathLike | None = None,
    progress: Progress = silent,
) -> Smoothness:
    """Compare trainings with weights 1, 1 + h v and 1 + 2 h v.

    ``value = sum_j |d_j| sign(a_j) sign(b_j) / sum_j |d_j|`` over the parameters, with a the change of the trained parameters
    from the first to the second training, b from the second to the third, and d = a + b. Where it is far below 1, parameters
    turn round within the distance h: derivatives at w = 1 then say little of the removal of items, and the recipe should
    change.

    Args:
        model, loss, train: see :class:`~pyattr.attribution.MAGIC`.
        recipe: how to train.
        h: of the size of what is to be foretold.
        seed: of the training, and of v.
        direction: v, [N]; standard normal if None.
        directory: where the trainings keep their states, so that interrupted ones go on to the same bits; None: in memory.
        progress: stage "metasmoothness" (steps of three trainings).

    Returns:
        :class:`Smoothness`. A training that did not move at all counts as smooth; one that diverged has NaN.

    Raises:
        TypeError, ValueError: an argument is not as above, or the directory holds other trainings.
        RuntimeError: a training that is taken up comes out otherwise than before.

    Extra memory: nine vectors of P, and what a step takes.

    Source: Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025, section 3.
    """
    train = as_rows(train, "train")
    training = WeightedTraining(model, loss, train, seed=seed, **recipe.settings)
    if not 0 < h < np.inf:
        raise ValueError(f"metasmoothness: h must be positive, got {h}")
    if direction is None:
        direction = torch.from_numpy(_rng(seed, _DIRECTION).standard_normal(len(train)))
    start = training.initial().theta
    v = check_weights(direction, len(train), start)
    ends = []
    try:
        for number in range(3):
            weights, where, settings = 1 + number * h * v, None, None
            if directory is not None:
                where = Path(directory) / f"training-{number}"
                where.mkdir(parents=True, exist_ok=True)
                settings = settings_of(model, train, weights, {**recipe.settings, "seed": seed})

            def within(done: int, of: int, stage: str, before: int = number * recipe.steps) -> None:
                progress(before + done, 3 * recipe.steps, "metasmoothness")

            # With one state to spare none is laid down but the last, and with a directory one a minute.
            plain = Scheme("binomial", recipe.steps)
            replay = Replay(training, weights, plain, directory=where, settings=settings, progress=within)
            ends.append(replay.train().theta)
    except FloatingPointError:
        return Smoothness(recipe, np.nan, np.nan, np.nan, np.inf)
    first, second = (ends[1] - ends[0]).double(), (ends[2] - ends[1]).double()
    moved = (first + second).abs()
    far = float(moved.sum())
    value = float((moved * first.sign() * second.sign()).sum()) / far if far else 1.0
    linearity = float(torch.nn.functional.cosine_similarity(first, second, dim=0)) if far else 1.0
    way = float((ends[0] - start).double().norm())
    change = float((first + second).norm()) / way if way else 0.0
    return Smoothness(recipe, value, linearity, change, _loss(training, loss, ends[0], seed))


def grid(steps: Sequence[int], batch_sizes: Sequence[int], **options: Sequence) -> list[Recipe]:
    """All combinations: ``grid([500], [64, 256], learning_rate=[1e-3, 1e-2], eps_root=[1e-8, 1e-4])``."""
    optimisers = [Adam(**dict(zip(options, values, strict=True))) for values in itertools.product(*options.values())]
    return [Recipe(*choice) for choice in itertools.product(steps, batch_sizes, optimisers)]


def search(
    model: nn.Module,
    loss: Loss,
    train,
    recipes: Sequence[Recipe],
    *,
    enough: float = 0.9,
    h: float = 0.1,
    seed: int = 0,
    directory: str | os.PathLike | None = None,
    progress: Progress = silent,
    found: Callable[[Smoothness], None] | None = None,
) -> list[Smoothness]:
    """Try recipes, and order them by what a user wants of one: first those that are smooth, by how well they train.

    Args:
        model, loss, train, h, seed, progress: see :func:`metasmoothness`; progress counts the recipes' steps one after the
            other.
        recipes: what to try; see :func:`grid`.
        directory: where each recipe's trainings keep their states, in a folder of their own, so that an interrupted search goes
            on, and a later one with other recipes makes only the new ones; None: in memory.
        enough: the smoothness from which only the loss counts. Recipes below it follow by falling smoothness.
        found: called with each outcome as it comes.

    Returns:
        One for each recipe. The first is the one to use if its value is at least ``enough``, and else the smoothest.

    Raises:
        TypeError, ValueError: an argument is not as above, there are no recipes, or the directory holds other trainings.
    """
    if not recipes:
        raise ValueError("search: recipes must hold at least one recipe, got none")
    check_numbers("search", **{f"steps of recipe {i}": recipe.steps for i, recipe in enumerate(recipes)})
    outcomes, before, total = [], 0, 3 * sum(recipe.steps for recipe in recipes)
    for recipe in recipes:

        def within(done: int, of: int, stage: str, before: int = before) -> None:
            progress(before + done, total, stage)

        where = None if directory is None else Path(directory) / f"recipe-{_name(recipe)}"
        outcomes.append(metasmoothness(model, loss, train, recipe, h=h, seed=seed, directory=where, progress=within))
        before += 3 * recipe.steps
        if found is not None:
            found(outcomes[-1])

    def rank(outcome: Smoothness) -> tuple:
        if outcome.value >= enough:
            return 0, outcome.loss
        return (1, -outcome.value) if outcome.value == outcome.value else (2, 0)

    return sorted(outcomes, key=rank)


def _loss(training: WeightedTraining, loss: Loss, theta: Tensor, seed: int) -> float:
    """The mean over the items of the loss that they are trained with, in batches, with draws that no training saw."""
    rng, count, total = _rng(seed, _HELD), len(training.train), 0.0
    with torch.no_grad(), torch.random.fork_rng([] if theta.device.type == "cpu" else [theta.device]):
        torch.manual_seed(seed)
        for first in range(0, count, training.batch_size):
            rows = take(training.train, torch.arange(first, min(first + training.batch_size, count)), theta.device)
            total += float(training.call(theta, loss, rows, rng).double().sum())
    return total / count


def _name(recipe: Recipe) -> str:
    """The same for the same recipe, in any order of recipes."""
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, purpose]))
