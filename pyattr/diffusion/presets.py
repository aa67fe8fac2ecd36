"""Networks with known settings: the two U-Nets of the D-TRAK benchmarks, and a small one for a few minutes on a CPU."""

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import Schedule


def diffusers() -> types.ModuleType:
    """The diffusers package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("U-Nets need the package diffusers: install pyattr[models]") from None


class PatchUNet(nn.Module):
    """A small U-Net that learns fast: it works on patches, and predicts the noise through the velocity.

    ``e(x_t, t) = sqrt(1 - abar_t) x_t + sqrt(abar_t) shuffle(unet(unshuffle(x_t), t))``, where the shuffle makes each p x p
    square of pixels one position with p^2 times the channels. Most of a small U-Net's time goes into its finest level,
    which patches remove. With this sum the network's own output is the velocity ``sqrt(abar_t) eps - sqrt(1 - abar_t) x``:
    an error of it enters the estimate of x with the factor sqrt(1 - abar_t), while an error of e would enter with
    sqrt(1 - abar_t) / sqrt(abar_t), up to 160, and no short training gets e that precise.

    Args:
        unet: a network on [B, p^2 C, H / p, W / p].
        patch: p.
        schedule: gives abar_t.

    Source: Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 4 and appendix
    D, for the velocity.
    """

    def __init__(self, unet: nn.Module, patch: int, schedule: Schedule):
        super().__init__()
        self.unet, self.patch, self.schedule = unet, patch, schedule
        self.register_buffer("abar", schedule.alphas_cumprod.to(torch.get_default_dtype()))  # [T]

    @property
    def config(self) -> dict:
        """``in_channels`` and ``sample_size`` of the images, as a diffusers model has them."""
        inner = self.unet.config
        return {
            "in_channels": inner["in_channels"] // self.patch**2,
            "sample_size": inner["sample_size"] * self.patch,
        }

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:  # [B, C, H, W], [B] -> [B, C, H, W]
        abar = self.abar[timesteps][:, None, None, None]  # [B, 1, 1, 1]
        patches = F.pixel_unshuffle(images, self.patch)
        velocity = F.pixel_shuffle(self.unet(patches, timesteps).sample, self.patch)
        return (1 - abar).sqrt() * images + abar.sqrt() * velocity


def _levels(kind: str, count: int, attention: tuple[int, ...]) -> tuple[str, ...]:
    plain, attending = {"down": ("DownBlock2D", "AttnDownBlock2D"), "up": ("UpBlock2D", "AttnUpBlock2D")}[kind]
    order = range(count) if kind == "down" else reversed(range(count))
    return tuple(attending if level in attention else plain for level in order)


def _unet(channels: int, size: int, widths: tuple[int, ...], attention: tuple[int, ...], **settings) -> nn.Module:
    return diffusers().UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=_levels("down", len(widths), attention),
        up_block_types=_levels("up", len(widths), attention),
        resnet_time_scale_shift="scale_shift",
        # Without it recent diffusers leave the middle attention unnormalised under scale_shift, unlike those of D-TRAK.
        attn_norm_num_groups=settings.get("norm_num_groups", 32),
        **settings,
    )


def _cifar(channels: int, size: int, dropout: float, schedule: Schedule) -> nn.Module:
    # One attention head of full width; attention at half resolution and in the middle.
    return _unet(
        channels,
        size,
        (128, 256, 256, 256),
        (1,),
        layers_per_block=2,
        dropout=dropout,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def _celeba(channels: int, size: int, dropout: float, schedule: Schedule) -> nn.Module:
    return _unet(
        channels,
        size,
        (128, 128, 256, 256, 512, 512),
        (4,),
        layers_per_block=2,
        dropout=dropout,
        attention_head_dim=8,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def _mnist_small(channels: int, size: int, dropout: float, schedule: Schedule) -> nn.Module:
    # Attention where 7 x 7 positions are left: without it strokes are right but do not add up to a digit.
    unet = _unet(
        4 * channels,
        size // 2,
        (24, 48),
        (1,),
        layers_per_block=1,
        dropout=dropout,
        norm_num_groups=8,
        attention_head_dim=None,
    )
    return PatchUNet(unet, 2, schedule)


@dataclass(frozen=True)
class Preset:
    """A network and the images that it was made for.

    Attributes:
        build: ``(channels, size, dropout, schedule) -> model``.
        channels, size: of the images.
        divisor: what a size must be a multiple of.
    """

    build: Callable[[int, int, float, Schedule], nn.Module]
    channels: int
    size: int
    divisor: int


PRESETS = {
    "cifar": Preset(_cifar, 3, 32, 8),
    "celeba": Preset(_celeba, 3, 64, 32),
    "mnist-small": Preset(_mnist_small, 1, 28, 4),
}


def unet(
    name: str,
    *,
    channels: int | None = None,
    size: int | None = None,
    dropout: float = 0.0,
    schedule: Schedule | None = None,
) -> nn.Module:
    """A U-Net with random weights; seed torch first to get the same ones again.

    ``cifar`` and ``celeba`` are the networks of the D-TRAK benchmarks on CIFAR and CelebA (38,307,203 and 118,795,011
    parameters); ``mnist-small`` is made for 28 x 28 grey digits and minutes on two cores (427,204 parameters).

    Args:
        name: one of :data:`PRESETS`.
        channels, size: of the images, where they differ from what the network was made for.
        dropout: probability in every residual block while training; D-TRAK trains with 0.1.
        schedule: the one to train with, which ``mnist-small`` has built in; the default one if None.

    Raises:
        ValueError: an unknown name, or a size that the network cannot halve often enough.
        ImportError: diffusers is missing: install pyattr[models].

    Source: Zheng et al., ICLR 2024 (D-TRAK), and its published configuration files.
    """
    if name not in PRESETS:
        raise ValueError(f"unet: name must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    channels, size = channels or preset.channels, size or preset.size
    if channels < 1 or size < 1 or size % preset.divisor:
        raise ValueError(
            f"unet: {name} needs at least one channel and a size that is a multiple of {preset.divisor}, "
            f"got {channels} channels of size {size}"
        )
    return preset.build(channels, size, dropout, schedule or Schedule())
