"""Images and queries that the tests of patch_topk share."""

import torch
from torch.nn import functional


def pixels(*shape, seed=0):
    """uint8 images that are smooth, so that patches resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator)
    smooth = functional.avg_pool2d(functional.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (smooth * 200 + 128).clamp(0, 255).to(torch.uint8)


def noisy(bank, scale, sigma, count=1, seed=1):
    """Queries [Q, C, H, W]: images of the bank as a diffusion would leave them."""
    generator = torch.Generator().manual_seed(seed)
    clean = (2 * bank[:count].float() - 255) / 255
    return scale * clean + sigma * torch.randn(clean.shape, generator=generator)
