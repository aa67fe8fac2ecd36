"""The score network of the authors' tutorial on score-based models, and what it is trained with."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flow import SPACINGS
from .images import reference_parameter
from .sde import SDE, VarianceExploding


class ScoreNet(nn.Module):
    """``s(x, t) = u(x, t) / std(t)`` with a U-Net u for grey images of 28 x 28; 1,115,297 parameters at the full widths.

    Time enters through fixed random Fourier features and a linear map into every level but the last.

    Args:
        sde: gives std.
        widths: channels of the four levels; the first a multiple of 4, the others of 32. The tutorial's if not given.
        embedding: features of the time, even.
        seed: of the Fourier features' frequencies, which are buffers. Weights come from torch's generator.
        scale: what the output is multiplied by; below 1 training starts nearer to predicting nothing.

    Raises:
        ValueError: an argument is not as above.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021: the tutorial
    published with it.
    """

    def __init__(
        self,
        sde: SDE | None = None,
        *,
        widths: tuple[int, int, int, int] = (32, 64, 128, 256),
        embedding: int = 256,
        seed: int = 0,
        scale: float = 1.0,
    ):
        super().__init__()
        if len(widths) != 4 or widths[0] < 4 or widths[0] % 4 or any(w < 32 or w % 32 for w in widths[1:]):
            raise ValueError(f"ScoreNet: widths must be a multiple of 4 and three of 32, got {widths}")
        if embedding < 2 or embedding % 2:
            raise ValueError(f"ScoreNet: embedding must be even and positive, got {embedding}")
        self.sde = VarianceExploding() if sde is None else sde
        self.scale = scale
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 30 * torch.randn(embedding // 2, generator=generator))
        self.embed = nn.Linear(embedding, embedding)
        first, second, third, fourth = widths
        plain = {"kernel_size": 3, "bias": False}
        down = [(1, first, 1), (first, second, 2), (second, third, 2), (third, fourth, 2)]
        self.down = nn.ModuleList(nn.Conv2d(a, b, stride=stride, **plain) for a, b, stride in down)
        self.down_time = nn.ModuleList(nn.Linear(embedding, width) for width in widths)
        self.down_norm = nn.ModuleList(nn.GroupNorm(4 if i == 0 else 32, width) for i, width in enumerate(widths))
        up = [(fourth, third, 0), (2 * third, second, 1), (2 * second, first, 1)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, stride=2, output_padding=pad, **plain) for a, b, pad in up)
        self.up_time = nn.ModuleList(nn.Linear(embedding, width) for width in (third, second, first))
        groups = (32, 32, 32 if first % 32 == 0 else 4)
        self.up_norm = nn.ModuleList(
            nn.GroupNorm(group, width) for group, width in zip(groups, (third, second, first), strict=True)
        )
        self.out = nn.ConvTranspose2d(2 * first, 1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # [B, 1, 28, 28], [B] in [0, 1] -> [B, 1, 28, 28]
        angles = 2 * math.pi * t[:, None] * self.frequencies
        time = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))  # [B, E]
        skips, h = [], x
        for conv, shift, norm in zip(self.down, self.down_time, self.down_norm, strict=True):
            h = F.silu(norm(conv(h) + shift(time)[:, :, None, None]))
            skips.append(h)
        skips.pop()
        for conv, shift, norm in zip(self.up, self.up_time, self.up_norm, strict=True):
            h = F.silu(norm(conv(h) + shift(time)[:, :, None, None]))
            h = torch.cat([h, skips.pop()], 1)
        return self.scale * self.out(h) / self.sde.std(t)[:, None, None, None]


@dataclass(frozen=True)
class ScoreLoss:
    """``sum over pixels of (std(t) s(x_t, t) + eps)^2``, ``x_t = scale(t) x + std(t) eps``, t random in [start, 1].

    Of each image: ``loss(model, images [B, C, H, W], rng) -> [B]``, uint8 or floating point in the model's range.

    Args:
        sde: the forward process.
        start: the least time.
        low, high: the range that 0 and 255 of uint8 images become.
        mean: over the pixels, in place of the sum.
        spacing: what of the noise is uniform: "time", or "noise", log(std / scale), which weighs the error of the score by
            g(t)^2 in place of std(t)^2, as the likelihood does: small times, where most of it is decided, are hardly met
            otherwise.

    Raises:
        ValueError: spacing is neither.

    Source: Song et al., ICLR 2021, equation 7 with the weight std(t)^2; Song, Durkan, Murray, Ermon, "Maximum Likelihood
    Training of Score-Based Diffusion Models", NeurIPS 2021, for the other.
    """

    sde: SDE
    start: float = 1e-5
    low: float = 0.0
    high: float = 1.0
    mean: bool = False
    spacing: str = "time"

    def __post_init__(self):
        if self.spacing not in SPACINGS:
            raise ValueError(f"ScoreLoss: spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")

    def __call__(self, model: nn.Module, images: Tensor, rng: np.random.Generator) -> Tensor:
        like = reference_parameter(model, "ScoreLoss")
        x = images.to(like)
        if images.dtype == torch.uint8:
            x = self.low + x * ((self.high - self.low) / 255)
        if self.spacing == "time":
            t = torch.from_numpy(self.start + (1 - self.start) * rng.random(len(x))).to(x)
        else:
            first, last = self.sde.noise_level(torch.tensor([self.start, 1.0], dtype=torch.float64))
            t = self.sde.time_at(first + (last - first) * torch.from_numpy(rng.random(len(x)))).to(x)
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
        scale, std = (part[:, None, None, None] for part in (self.sde.scale(t), self.sde.std(t)))
        errors = (std * model(scale * x + std * eps, t) + eps).square().flatten(1)
        return errors.mean(1) if self.mean else errors.sum(1)
