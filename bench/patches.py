"""Images, queries and other ways to the same answer, for the benchmarks of the patch operations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

VARIANCE = 0.105  # about timestep 100 of the usual linear schedule of 1000


@dataclass(frozen=True)
class Case:
    """One column of a table: a query against a bank."""

    images: int
    size: int
    patch_size: int
    k: int
    border: str = "class"
    lowres: bool = False
    channels: int = 3

    @property
    def grid(self) -> int:
        return self.size - 1 + self.patch_size % 2

    @property
    def pairs(self) -> float:
        """Pairs of patches that may match."""
        inside = max(0, self.size - self.patch_size + 1)
        along = inside**2 + self.grid - inside if self.border == "class" else self.grid**2
        return float(self.images * along**2)

    @property
    def options(self) -> dict:
        return {
            "patch_size": self.patch_size,
            "sigma": VARIANCE**0.5,
            "scale": (1 - VARIANCE) ** 0.5,
            "border": self.border,
        }


@functools.cache
def bank(images: int, size: int, channels: int = 3) -> torch.Tensor:
    """[N, C, H, W] uint8 with the spectrum of photographs: amplitudes fall as one over the frequency."""
    generator = torch.Generator().manual_seed(11)
    down = torch.fft.fftfreq(size)[:, None]
    along = torch.fft.rfftfreq(size)[None]
    falloff = 1 / (down**2 + along**2).sqrt().clamp(min=1 / size)
    out = torch.empty(images, channels, size, size, dtype=torch.uint8)
    for chunk in out.split(1000):
        smooth = torch.fft.irfft2(
            torch.fft.rfft2(torch.randn(chunk.shape, generator=generator)) * falloff, s=(size, size)
        )
        smooth = smooth / smooth.std() * 55 + 125 + 40 * torch.randn(len(chunk), 1, 1, 1, generator=generator)
        chunk.copy_(smooth.clamp(0, 255).round().to(torch.uint8))
    return out


@functools.cache
def query(case: Case) -> torch.Tensor:
    """[1, C, H, W]: an image that the bank does not hold, noised."""
    clean = (2 * bank(case.images + 1, case.size, case.channels)[-1:].float() - 255) / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(12))
    return (1 - VARIANCE) ** 0.5 * clean + VARIANCE**0.5 * noise


def decoded(case: Case) -> torch.Tensor:
    """The bank as float32, times the scale."""
    return (2 * bank(case.images + 1, case.size, case.channels)[:-1].float() - 255) / 255 * (1 - VARIANCE) ** 0.5


def published_procedure(case: Case, kernels: int = 64, mask: float = 10.0, positions: int | None = None) -> Callable:
    """The published code's way, in float32 on all threads: a mask constant beyond the border, ``kernels`` patches of
    the query a convolution, softmax over the whole bank, topk over each image. Of the first ``positions`` positions
    only, when given.

    The call gives weights [N] of those positions.
    """
    pad, p = (case.patch_size - 1) // 2, case.patch_size
    x, y = query(case)[0], decoded(case)
    beyond = mask * (1 - functional.pad(torch.ones_like(x), [pad] * 4))
    y = functional.pad(y, [pad] * 4) + beyond  # [N, C, H + 2 pad, W + 2 pad]
    patches = (functional.pad(x, [pad] * 4) + beyond).unfold(1, p, 1).unfold(2, p, 1)
    patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()[:positions]  # [U, C, p, p]

    def call():
        squares = functional.conv2d(y.square(), torch.ones_like(patches[:1]))[:, 0].flatten(1)  # [N, L]
        weights = torch.zeros(case.images)
        for some in patches.split(kernels):
            cross = functional.conv2d(y, some).flatten(2).transpose(0, 1)  # [u, N, L]
            norms = some.square().sum((1, 2, 3))[:, None, None]
            d = (norms + squares - 2 * cross).clamp_(min=0)
            shares = torch.softmax((d / (-2 * VARIANCE)).flatten(1), dim=1).view_as(d)
            weights += shares.topk(min(case.k, d.shape[2]), dim=2).values.sum((0, 2))
        return weights

    return call


def interior(case: Case) -> slice:
    """Positions of an axis whose windows no border cuts."""
    pad = (case.patch_size - 1) // 2
    return slice(pad, pad + case.size - case.patch_size + 1)


def convolution_normaliser(case: Case, images: int = 50, kernels: int = 64, positions: int | None = None) -> Callable:
    """log Z alone of the interior positions, by convolutions of some images at a time and a running logsumexp."""
    p = case.patch_size
    patches = (
        query(case)[0].unfold(1, p, 1).unfold(2, p, 1).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()[:positions]
    )
    y = decoded(case)

    def call():
        out = torch.full((len(patches),), -torch.inf)
        norms = patches.square().sum((1, 2, 3))
        for chunk in y.split(images):
            squares = functional.conv2d(chunk.square(), torch.ones_like(patches[:1])).flatten(1)  # [n, L]
            for first in range(0, len(patches), kernels):
                some = slice(first, first + kernels)
                cross = functional.conv2d(chunk, patches[some]).flatten(2).transpose(0, 1)  # [u, n, L]
                d = (norms[some, None, None] + squares - 2 * cross).clamp_(min=0)
                out[some] = torch.logaddexp(out[some], torch.logsumexp((d / (-2 * VARIANCE)).flatten(1), 1))
        return out

    return call


def unfold_and_cdist(case: Case, images: int = 8, positions: int | None = None) -> Callable:
    """The same from unfolded patches and cdist by differences: nothing cancels, p^2 times the memory."""
    x = functional.unfold(query(case), case.patch_size)[0].T.contiguous()[:positions]  # [U, K]
    y = decoded(case)

    def call():
        out = torch.full((len(x),), -torch.inf)
        for chunk in y.split(images):
            patches = functional.unfold(chunk, case.patch_size).mT.flatten(0, 1)  # [n L, K]
            d = torch.cdist(x, patches, compute_mode="donot_use_mm_for_euclid_dist").square_()
            out = torch.logaddexp(out, torch.logsumexp(d / (-2 * VARIANCE), 1))
        return out

    return call


def convolution_mean(case: Case, kernels: int = 64, positions: int | None = None) -> Callable:
    """The mean of the centres of patches wholly inside: convolutions with the whole bank, softmax, matmul.

    The call gives [C, positions].
    """
    p, half = case.patch_size, (case.patch_size - 1) // 2
    patches = (
        query(case)[0].unfold(1, p, 1).unfold(2, p, 1).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()[:positions]
    )
    y = decoded(case)
    last = half + case.size - p + 1
    centres = y[:, :, half:last, half:last].transpose(0, 1).flatten(1) / (1 - VARIANCE) ** 0.5  # [C, N L]

    def call():
        squares = functional.conv2d(y.square(), torch.ones_like(patches[:1]))[:, 0].flatten(1)  # [N, L]
        means = []
        for some in patches.split(kernels):
            cross = functional.conv2d(y, some).flatten(2).transpose(0, 1)  # [u, N, L]
            d = (some.square().sum((1, 2, 3))[:, None, None] + squares - 2 * cross).clamp_(min=0)
            means.append(centres @ torch.softmax((d / (-2 * VARIANCE)).flatten(1), dim=1).T)
        return torch.cat(means, 1)

    return call
