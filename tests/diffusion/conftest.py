import diffusers
import pytest
import torch
from torch import nn

from pyattr.diffusion import Schedule


class TinyNet(nn.Module):
    """Two convolutions with the time between them, and dropout: everything a training run has to restore."""

    def __init__(self, channels=1, dropout=0.2):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.time = nn.Linear(1, 4)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, images, timesteps):
        time = self.time(timesteps[:, None].to(images.dtype) / 1000)[:, :, None, None]
        return self.last(self.drop(nn.functional.silu(self.first(images) + time)))


@pytest.fixture
def tiny_net():
    """Builds the same small network each time."""

    def build(seed=0, **arguments):
        torch.manual_seed(seed)
        return TinyNet(**arguments)

    return build


@pytest.fixture
def tiny_unet():
    """Builds the same diffusers U-Net for 8 x 8 grey images each time, with attention, scale-shift and residual blocks."""

    def build(seed=0):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attn_norm_num_groups=4,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
        ).eval()

    return build


@pytest.fixture
def schedule():
    return Schedule()


@pytest.fixture
def images():
    return torch.randint(0, 256, (11, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
