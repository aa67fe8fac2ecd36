"""Forward processes in continuous time, ``dx = f(t) x dt + g(t) dw`` for t in [0, 1], and scores from noise predictors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .images import predict_noise
from .schedule import Schedule


@dataclass(frozen=True)
class VarianceExploding:
    """``dx = sigma^t dw``: nothing is drawn in, ``x_t = x + std(t) eps`` with ``std(t)^2 = (sigma^{2 t} - 1) / (2 ln sigma)``.

    Args:
        sigma: above 1.

    Raises:
        ValueError: it is not.

    Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
    Differential Equations", ICLR 2021, section 3.4; in this form, the authors' tutorial.
    """

    sigma: float = 25.0

    def __post_init__(self):
        if not 1 < self.sigma < math.inf:
            raise ValueError(f"VarianceExploding: sigma must be above 1, got {self.sigma}")

    def drift(self, t: Tensor) -> Tensor:
        """f(t), of the shape and dtype of t."""
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return self.sigma**t

    def scale(self, t: Tensor) -> Tensor:
        """By what the image is multiplied at t."""
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        """Of the noise at t."""
        twice = 2 * math.log(self.sigma)
        return (torch.expm1(twice * t) / twice).sqrt()

    def noise_level(self, t: Tensor) -> Tensor:
        """``log(std / scale)`` at t."""
        return self.std(t).log()

    def time_at(self, level: Tensor) -> Tensor:
        """t at a noise level."""
        twice = 2 * math.log(self.sigma)
        return torch.log1p(twice * (2 * level).exp()) / twice

    @property
    def prior_std(self) -> float:
        """Of the distribution N(0, std^2) that the process is taken to end in."""
        return float(self.std(torch.ones((), dtype=torch.float64)))


@dataclass(frozen=True)
class VariancePreserving:
    """``dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw`` with beta linear: ``x_t = scale x + sqrt(1 - scale^2) eps``.

    Args:
        beta_min, beta_max: beta(0) and beta(1), positive.

    Raises:
        ValueError: they are not.

    Source: Song et al., ICLR 2021, equation 11.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min < math.inf or not 0 < self.beta_max < math.inf:
            raise ValueError(
                f"VariancePreserving: beta_min and beta_max must be positive, got {self.beta_min}, {self.beta_max}"
            )

    @classmethod
    def of(cls, schedule: Schedule) -> "VariancePreserving":
        """The limit of a DDPM's schedule: ``beta(t) = T beta_{T t - 1}``.

        ``scale(t)^2 = exp(-integral of beta)`` then stands for ``abar_{T t - 1}``, a product of ``1 - beta_s``; its logarithm
        differs by half the sum of beta_s^2: 0.07 of -10.1 at the end of the default schedule.

        Raises:
            ValueError: beta does not run linearly.
        """
        if type(schedule) is not Schedule:
            raise ValueError(f"VariancePreserving: schedule must have linear betas, got {schedule}")
        total = schedule.num_timesteps
        return cls(total * schedule.beta_start, total * schedule.beta_end)

    def drift(self, t: Tensor) -> Tensor:
        """f(t), of the shape and dtype of t."""
        return -self._beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return self._beta(t).sqrt()

    def scale(self, t: Tensor) -> Tensor:
        """By what the image is multiplied at t."""
        return self._log_scale(t).exp()

    def std(self, t: Tensor) -> Tensor:
        """Of the noise at t."""
        return (-torch.expm1(2 * self._log_scale(t))).sqrt()

    def noise_level(self, t: Tensor) -> Tensor:
        """``log(std / scale)`` at t."""
        return torch.expm1(-2 * self._log_scale(t)).log() / 2

    def time_at(self, level: Tensor) -> Tensor:
        """t at a noise level."""
        faded = torch.logaddexp(torch.zeros_like(level), 2 * level) / 2  # -log scale, a square function of t
        half = self.beta_min / 2
        return 2 * faded / (half + (half**2 + (self.beta_max - self.beta_min) * faded).sqrt())

    @property
    def prior_std(self) -> float:
        """Of the distribution N(0, std^2) that the process is taken to end in."""
        return 1.0

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _log_scale(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2


SDE = VarianceExploding | VariancePreserving


class NoiseScore(nn.Module):
    """The score of a network that predicts noise: ``s(x, t) = -e(x, label) / std(t)``, label = T t - 1.

    A DDPM's timestep i is time (i + 1) / T. Labels between two timesteps are real numbers, which networks that embed the
    timestep by sines take; before the first they are 0.

    Args:
        model: ``model(x_t, label)`` predicts the noise.
        schedule: the one it was trained with.
        round_labels: give the model the nearest timestep, an integer, as those need that look timesteps up in a table. The
            score then jumps, which adaptive solvers notice.

    Source: Song et al., ICLR 2021, appendix B.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, round_labels: bool = False):
        super().__init__()
        self.model, self.schedule, self.round_labels = model, schedule, round_labels
        self.sde = VariancePreserving.of(schedule)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # [B, ...], [B] -> [B, ...]
        labels = (self.schedule.num_timesteps * t - 1).clamp(0, self.schedule.num_timesteps - 1)
        if self.round_labels:
            labels = labels.round().long()
        std = self.sde.std(t).reshape(-1, *[1] * (x.dim() - 1))
        return -predict_noise(self.model, x, labels) / std
