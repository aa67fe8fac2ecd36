"""The forward process: how much noise an image carries at each timestep."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear variance schedule of a DDPM.

    ``beta_t`` runs linearly from ``beta_start`` to ``beta_end`` over t = 0..T-1, ``abar_t = prod_{s<=t} (1 - beta_s)``, and
    ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps`` with eps standard normal.

    Args:
        num_timesteps: T, at least 1.
        beta_start, beta_end: 0 < beta_start <= beta_end < 1.

    Raises:
        ValueError: an argument is not as above.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, section 4 (their t is ours + 1).
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"Schedule: num_timesteps must be at least 1, got {self.num_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"Schedule: betas must satisfy 0 < beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}"
            )

    @functools.cached_property
    def betas(self) -> Tensor:
        """[T] float64, on the CPU."""
        # The device is named so that a default device set around the first use does not stay with the schedule.
        return torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64, device="cpu")

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar, [T] float64, on the CPU."""
        return (1 - self.betas).cumprod(0)

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps``.

        Args:
            images: x, [*B, C, H, W] floating point.
            noise: eps, same shape.
            timesteps: t, [*B] int64 in [0, T).

        Returns:
            x_t, [*B, C, H, W], in the dtype and on the device of ``images``.

        Extra memory: one tensor of the size of ``images``.
        """
        abar = self.alphas_cumprod[timesteps.cpu()][..., None, None, None]  # [*B, 1, 1, 1] float64
        signal, spread = (c.to(images.device, images.dtype) for c in (abar.sqrt(), (1 - abar).sqrt()))
        return torch.addcmul(signal * images, spread, noise)

    def elbo_weights(self, timesteps: Tensor) -> Tensor:
        """Weight of the squared error at each timestep in the variational bound, with sigma_t^2 = beta_t.

        ``w_t = beta_t / (2 (1 - beta_t) (1 - abar_t))``.

        Args:
            timesteps: t, any shape, int64 in [0, T).

        Returns:
            float64, on the CPU, of the shape of ``timesteps``.

        Source: Ho et al. 2020, equation 12.
        """
        t = timesteps.cpu()
        beta = self.betas[t]
        return beta / (2 * (1 - beta) * (1 - self.alphas_cumprod[t]))


@dataclass(frozen=True)
class ScaledLinearSchedule(Schedule):
    """The schedule of latent diffusion models: not ``beta_t`` but its square root runs linearly.

    ``sqrt(beta_t)`` from ``sqrt(beta_start)`` to ``sqrt(beta_end)``; the rest as in :class:`Schedule`.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, and its published code.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    kind: str = field(default="scaled_linear", init=False)  # among the settings of stored results

    @functools.cached_property
    def betas(self) -> Tensor:
        """[T] float64, on the CPU."""
        ends = self.beta_start**0.5, self.beta_end**0.5
        return torch.linspace(*ends, self.num_timesteps, dtype=torch.float64, device="cpu").square()


def as_schedule(settings: dict) -> Schedule:
    """The schedule whose fields were stored."""
    fields = {name: value for name, value in settings.items() if name != "kind"}
    return (Schedule if "kind" not in settings else ScaledLinearSchedule)(**fields)


def check_schedule(model: nn.Module, schedule: Schedule, op: str) -> None:
    """Refuse a schedule other than the one that a model computes with, where it has one of its own.

    Args:
        model: has a ``schedule`` where its prediction depends on abar_t.
        op: for the error message.

    Raises:
        ValueError: they differ; the noise would be another than the model takes it for.
    """
    own = getattr(model, "schedule", None)
    if isinstance(own, Schedule) and own != schedule:
        raise ValueError(f"{op}: schedule must be the model's own, {own}, got {schedule}")
