"""Classifier-free guidance: a conditional model that exaggerates what its condition changes."""

import math

import torch
from torch import Tensor, nn

from .checkpoint import identity
from .images import predict_noise
from .schedule import Schedule


class Guided(nn.Module):
    """What to sample with: ``e(x, t, c) = e(x, t, nothing) + scale (e(x, t, c) - e(x, t, nothing))``.

    Samples made by it may be asked about with the model that it guides, whose gradients are those of training.

    Args:
        model: a conditional model whose ``unconditional`` is the condition that says nothing, as
            :class:`~pyattr.diffusion.latent.LatentModel` has it.
        scale: 1 is the model itself; Stable Diffusion's default is 7.5.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: a batch of twice the size.

    Source: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2021; its scale is 1 + w here.
    """

    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        if not hasattr(model, "unconditional"):
            raise TypeError(f"Guided: model must have a condition that says nothing, got {type(model).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"Guided: scale must be finite, got {scale}")
        self.model, self.scale = model, float(scale)

    @property
    def num_conditions(self) -> int:
        """Of the model."""
        return self.model.num_conditions

    @property
    def latents(self) -> bool:
        """Of the model."""
        return getattr(self.model, "latents", False)

    @property
    def schedule(self) -> Schedule | None:
        """Of the model."""
        return getattr(self.model, "schedule", None)

    @property
    def config(self) -> dict | None:
        """Of the model."""
        return getattr(self.model, "config", None)

    def identity(self) -> dict:
        """The model's, and the scale."""
        return {**identity(self.model), "guidance": self.scale}

    def forward(self, images: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """The guided prediction: [B, C, H, W], [B], [B] -> [B, C, H, W]."""
        if self.scale == 1:
            return predict_noise(self.model, images, timesteps, conditions)
        nothing = torch.full_like(conditions, self.model.unconditional)
        both = predict_noise(
            self.model, images.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([nothing, conditions])
        )
        without, told = both.chunk(2)
        return without + self.scale * (told - without)
