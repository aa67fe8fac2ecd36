"""Losses that MAGIC trains with, and functions of the trained model that it attributes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...diffusion.conditioned import separate
from ...diffusion.images import predict_noise, reference_parameter, to_unit
from ...diffusion.likelihood import bits_per_dimension, dequantise, log_likelihood
from ...diffusion.schedule import Schedule
from ...diffusion.sde import SDE


@dataclass(frozen=True)
class NoiseLoss:
    """``mean (e(x_t, t) - eps)^2`` of images under networks that predict noise, t uniform: what DDPMs are trained with.

    Rows are images [B, C, H, W] uint8, or floating point in [-1, 1], or Conditioned.

    Args:
        schedule: abar_t.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 14.
    """

    schedule: Schedule

    def __call__(self, model: nn.Module, rows, rng: np.random.Generator) -> Tensor:  # -> [B]
        images, conditions = separate(rows)
        told = () if conditions is None else (conditions.to(images.device),)
        x = to_unit(images, reference_parameter(model, "NoiseLoss"))
        t = torch.from_numpy(rng.integers(self.schedule.num_timesteps, size=len(x)))
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
        noisy = self.schedule.add_noise(x, eps, t)
        return (predict_noise(model, noisy, t.to(x.device), *told) - eps).square().mean((1, 2, 3))


@dataclass(frozen=True)
class NegativeLoss:
    """phi = minus the mean of a loss over a fixed set of draws, the same for every query: higher for a likelier one.

    Args:
        loss: :class:`NoiseLoss`, :class:`~pyattr.diffusion.ScoreLoss` or any other ``(model, rows, rng) -> [B]``.
        draws: how many, at least 1.
        seed: of the draws, in [0, 2^32).

    Raises:
        ValueError: an argument is not as above.
    """

    loss: object
    draws: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"NegativeLoss: draws must be at least 1, got {self.draws}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"NegativeLoss: seed must lie in [0, {2**32 - 1}], got {self.seed}")

    def __call__(self, model: nn.Module, queries) -> Tensor:  # -> [Q]
        found = []
        for number in range(len(queries[0] if isinstance(queries, tuple) else queries)):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 0x6E656761]))
            found.append(-self.loss(model, _repeated(queries, number, self.draws), rng).mean())
        return torch.stack(found)


def _repeated(rows, number: int, count: int):
    """One of the rows, many times."""
    which = torch.full((count,), number)
    if isinstance(rows, tuple):
        return tuple(tensor[which.to(tensor.device)] for tensor in rows)
    return rows[which.to(rows.device)]


@dataclass(frozen=True)
class LogLikelihood:
    """phi = the exact log-density of an image by the probability-flow ODE, in nats, or minus its bits per dimension.

    Queries are uint8, which are dequantised with noise that is the same for every query and call, or floating point in the
    range [low, high], taken as they are.

    Args:
        sde: the forward process of the score.
        score: makes the score of the trained model, such as ``lambda model: NoiseScore(model, schedule)``; None: it is one.
        solver, steps, spacing, divergence, probes, at_a_time: see :func:`pyattr.diffusion.log_likelihood`.
        low, high: the range that the model's images have.
        bits: minus bits per dimension in place of nats.
        seed: of dequantisation and of the probes of "hutchinson".
    """

    sde: SDE
    score: object = None
    solver: str = "rk4"
    steps: int = 20
    spacing: str = "noise"
    divergence: str = "exact"
    probes: int = 1
    at_a_time: int = 32
    low: float = 0.0
    high: float = 1.0
    bits: bool = False
    seed: int = 0

    def __call__(self, model: nn.Module, queries: Tensor) -> Tensor:  # [Q, C, H, W] -> [Q] float64
        like = reference_parameter(model, "LogLikelihood")
        same = torch.zeros(len(queries), dtype=torch.int64)
        if queries.dtype == torch.uint8:
            queries = dequantise(queries, seed=self.seed, ids=same, low=self.low, high=self.high)
        found = log_likelihood(
            model if self.score is None else self.score(model),
            queries.to(like),
            self.sde,
            divergence=self.divergence,
            probes=self.probes,
            seed=self.seed,
            ids=same if self.divergence == "hutchinson" else None,
            solver=self.solver,
            steps=self.steps,
            spacing=self.spacing,
            at_a_time=self.at_a_time,
            gradient="backprop" if torch.is_grad_enabled() else None,
        ).log_prob
        return -bits_per_dimension(found, queries[0].numel(), low=self.low, high=self.high) if self.bits else found
