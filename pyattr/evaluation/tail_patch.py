"""Tail patch: what one more step of training on an image that a method names does to a query's loss."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..diffusion.conditioned import Examples, as_examples, check_conditions, separate, with_conditions
from ..diffusion.images import evaluating, predict_noise, reference_parameter, to_unit
from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import Samples
from ..diffusion.schedule import Schedule, check_schedule
from .counterfactual_results import Effects
from .removal import RANDOM, checked_scores, random_scores, strongest
from .retrained import QueryLosses, check_between

_STEP = 0x7461696C  # key word 1 of the noise of the steps
_OP = "tail_patch"


@dataclass(frozen=True, eq=False)
class TailPatch:
    """The outcome of :func:`tail_patch`.

    Attributes:
        methods: A names, the last of them "random", the control.
        proponents: [A, Q, k] int64, the images of the largest scores, largest first.
        gains: [A, Q, k] float64, the query's loss before the step less that after it: positive where the image helps.
    """

    methods: tuple[str, ...]
    proponents: np.ndarray
    gains: np.ndarray

    @property
    def effects(self) -> Effects:
        """The tail-patch scores: means over the k proponents."""
        counts = (self.gains.shape[2],)
        return Effects("gain by a step on a proponent", self.methods, counts, self.gains.mean(2)[:, None])


def tail_patch(
    model: nn.Module,
    schedule: Schedule,
    images,
    queries,
    scores: Mapping,
    *,
    learning_rate: float,
    top: int = 10,
    steps: int = 1,
    step_timesteps: int = 10,
    step_seed: int = 0,
    query_ids=None,
    control_seed: int = 0,
    timesteps: int = 100,
    num_noises: int = 1,
    noise_seed: int = 0,
    rows_per_pass: int = 256,
    progress: Progress = silent,
) -> TailPatch:
    """By how much a gradient step on each of a query's proponents, one at a time from the trained model, lowers its loss.

    ``gain(q, n) = L(q; theta) - L(q; theta - eta grad l_n(theta))``, L the mean squared error of the noise over timesteps as in
    :func:`~pyattr.evaluation.build_ground_truth`, l_n the same of image n with other noise; with several steps, one after the
    other. The score of a query is the mean over its k proponents. To first order it is eta times the inner product of the
    gradients: it judges what a trained model would still learn from an image, and says nothing of a training without it.

    Args:
        model: trained; evaluated in eval mode. Its weights are those of before when this ends, however it ends.
        schedule: of the diffusion.
        images: the training images, [N, C, H, W] uint8, or floating point in [-1, 1]; for a conditional model
            :class:`~pyattr.diffusion.Conditioned`.
        queries: [Q, C, H, W] likewise, or :class:`~pyattr.diffusion.Samples`. The losses of guided ones are those of the model
            itself.
        scores: names of methods to [Q, N] scores, positive = proponent; no NaN. Of equal ones the first counts as larger.
        learning_rate: eta of plain gradient descent, without the moments and the decay of the training.
        top: k, in [1, N].
        steps: of gradient descent.
        step_timesteps: K of T that l_n is the mean over, evenly spaced.
        step_seed: of the noise of the steps, a function of (seed, image, step); in [0, 2^32).
        query_ids: [Q] distinct integers in [0, 2^63), of which the noise of L is a function; None: those of the samples, or
            0..Q-1.
        control_seed: of a control that takes k images at random for each query; in [0, 2^32).
        timesteps, num_noises, noise_seed, rows_per_pass: of L, see :func:`~pyattr.evaluation.build_ground_truth`.
        progress: stage "tail patch", counts the different proponents.

    Returns:
        :class:`TailPatch`. A proponent of several queries or methods is stepped on once.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: the weights twice, the activations of K noisy images with their gradients, and of ``rows_per_pass`` without.

    Source: Chang et al., "Scalable Influence and Fact Tracing for Large Language Model Pretraining", ICLR 2025, the tail-patch
    score, with the loss in place of a text's probability.
    """
    images = as_examples(images, _OP, "images")
    if isinstance(queries, Samples):
        query_ids = queries.ids if query_ids is None else query_ids
        queries = with_conditions(queries.images, queries.conditions)
    else:
        queries = as_examples(queries, _OP, "queries")
    check_conditions(model, images, _OP, "images")
    check_conditions(model, queries, _OP, "queries")
    query_ids = torch.arange(len(queries)) if query_ids is None else torch.as_tensor(query_ids, dtype=torch.int64)
    if query_ids.shape != queries.shape[:1] or len(query_ids.unique()) != len(query_ids):
        raise ValueError(
            f"{_OP}: query_ids must be {len(queries)} distinct integers, got shape {list(query_ids.shape)}"
        )
    if (query_ids < 0).any():
        raise ValueError(f"{_OP}: query_ids must lie in [0, 2^63), got {int(query_ids.min())}")
    if len(queries) == 0 or queries.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"{_OP}: queries must be at least one image of shape {list(images.shape[1:])}, got {list(queries.shape)}"
        )
    scores = checked_scores(scores, len(queries), len(images), _OP)
    for name, value, low, high in (
        ("top", top, 1, len(images)),
        ("steps", steps, 1, 2**31),
        ("step_timesteps", step_timesteps, 1, schedule.num_timesteps),
        ("step_seed", step_seed, 0, 2**32 - 1),
        ("control_seed", control_seed, 0, 2**32 - 1),
    ):
        check_between(_OP, name, value, low, high)
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"{_OP}: learning_rate must be positive, got {learning_rate}")
    check_schedule(model, schedule, _OP)
    losses = QueryLosses(timesteps, num_noises, noise_seed, ("simple",), rows_per_pass)
    losses.check(schedule, _OP)
    control = random_scores(query_ids.numpy(), len(images), control_seed)
    methods = (*scores, RANDOM)
    proponents = np.stack([strongest(values, top) for values in (*scores.values(), control)])  # [A, Q, k]
    gains = np.full(proponents.shape, np.nan)
    step = _Step(model, schedule, learning_rate, steps, step_timesteps, step_seed)

    def loss_of(q: int) -> float:
        return float(losses(model, schedule, queries[q : q + 1], query_ids[q : q + 1]).mean())

    with evaluating(model):
        before = np.array([loss_of(q) for q in range(len(queries))])
        different = np.unique(proponents)
        for done, n in enumerate(different):
            progress(done, len(different), "tail patch")
            with step.taken(int(n), images[int(n) : int(n) + 1]):
                for q in np.flatnonzero((proponents == n).any((0, 2))):
                    gains[:, q][proponents[:, q] == n] = before[q] - loss_of(q)
        progress(len(different), len(different), "tail patch")
    return TailPatch(methods, proponents, gains)


class _Step:
    """Gradient descent on one image."""

    def __init__(self, model: nn.Module, schedule: Schedule, rate: float, steps: int, timesteps: int, seed: int):
        self.model, self.schedule, self.rate, self.steps, self.seed = model, schedule, rate, steps, seed
        self.times = QueryLosses(timesteps, 1, 0, (), 1).times(schedule)  # [K]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.like = reference_parameter(model, _OP)

    @contextmanager
    def taken(self, number: int, image: Examples) -> Iterator[None]:
        """The model after the steps on one image, [1, C, H, W], inside a `with`."""
        kept = [p.detach().clone() for p in self.parameters]
        try:
            for step in range(self.steps):
                self._descend(step, number, image)
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(self.parameters, kept, strict=True):
                    p.copy_(before)

    def _descend(self, step: int, number: int, image: Examples) -> None:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, _STEP], counter=[0, 0, step, number]))
        image, condition = separate(image)  # [1, C, H, W], [1]
        x = to_unit(image, self.like).expand(len(self.times), -1, -1, -1)  # [K, C, H, W]
        told = () if condition is None else (condition.to(x.device).expand(len(x)),)
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
        with torch.enable_grad():
            noisy = self.schedule.add_noise(x, eps, self.times)
            loss = (predict_noise(self.model, noisy, self.times.to(x.device), *told) - eps).square().mean()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            for p, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    p.sub_(self.rate * gradient)
