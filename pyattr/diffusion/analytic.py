"""Denoisers written down from the training images alone: what a network would predict if it saw only patches, or everything.

Each gives, for every pixel of a noisy image, the mean of the training pixels that could be under the noise, weighted by how
well what surrounds them fits. They differ in how far they look, and at which places of the training images:

| machine | sees | compares a pixel with |
| --- | --- | --- |
| "els" | p x p pixels, images continued round their edges | every place where a patch lies within a training image |
| "bbels" | p x p pixels, cut off at the border | every place whose patch is cut off in the same way |
| "ls" | p x p pixels, cut off at the border | the same place |
| "is" | the whole image | the same place |
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import patch_mean
from ..ops._patches import LARGEST_PATCH
from .images import as_images, evaluating, predict_noise, to_unit
from .noise import PATCHES, noise
from .schedule import Schedule

MACHINES = ("els", "bbels", "ls", "is")
_BLOCK = 1 << 20  # numbers of a block of training images that the machines without an op work on at a time


class ScoreMachine(nn.Module):
    """The optimal denoiser under a limit on what it sees, as a model that predicts noise.

    With s = sqrt(abar_t), sigma^2 = 1 - abar_t, and y_n[v] the patch of training image n at place v,

        x0(x)[u] = sum over n, v of  w(u, n, v) (pixel at the middle of y_n[v]),
        w = exp(-|x[u] - s y_n[v]|^2 / (2 sigma^2)) / (their sum over n and v),        eps(x) = (x - s x0) / sigma.

    "is" is the exact minimiser of the training loss and can only give training images back; the others, which see less, put
    patches together that no training image has together. An instance goes wherever a trained network does:
    ``sample(machine, schedule, shape=(1, 28, 28), num_images=8)``. None of them is differentiable: what they return carries no
    gradient.

    Args:
        images: the training images, [N, C, H, W] uint8, or floating point in [-1, 1] (float64 is rounded to float32).
        schedule: of the diffusion.
        machine: "els" (equivariant local), "bbels" (the same, broken at the border), "ls" (local) or "is" (ideal).
        patch_sizes: p, odd, at most 511 but for "ls"; a number, or ``{t: p}``, each from its timestep on to the next (the first
            also before it). None: :func:`default_patch_sizes`. Of no matter to "is".
        backend: of :func:`pyattr.ops.patch_mean`.

    Raises:
        TypeError, ValueError: an argument is not as above, or a patch of "els" is larger than the images.

    Extra memory: that of :func:`pyattr.ops.patch_mean`; for "ls" and "is" some 100 MB.

    Source: Kamb, Ganguli, "An analytic theory of creativity in convolutional diffusion models", ICML 2025. There a network's
    padding with zeros is what "bbels" stands for, and its convolutions with circular padding what "els" does.
    """

    def __init__(
        self,
        images,
        schedule: Schedule,
        machine: str = "bbels",
        *,
        patch_sizes: int | Mapping[int, int] | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        images = as_images(images, "ScoreMachine", "images")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"ScoreMachine: schedule must be a Schedule, got {type(schedule).__name__}")
        if images.numel() == 0:
            raise ValueError(f"ScoreMachine: images must not be empty, got shape {list(images.shape)}")
        if images.dtype == torch.float64:  # which no compiled backend takes
            images = images.float()
        if machine not in MACHINES:
            raise ValueError(f"ScoreMachine: machine must be one of {', '.join(MACHINES)}, got {machine!r}")
        backends.check_name("ScoreMachine", "backend", backend)
        if patch_sizes is None:
            patch_sizes = default_patch_sizes(schedule, min(images.shape[2:]))
        given = patch_sizes if isinstance(patch_sizes, Mapping) else {0: patch_sizes}
        try:
            sizes = {operator.index(t): operator.index(p) for t, p in given.items()}
        except TypeError:
            raise TypeError(f"ScoreMachine: patch_sizes must be integers, got {patch_sizes!r}") from None
        if not sizes:
            raise ValueError("ScoreMachine: patch_sizes must name at least one timestep, got none")
        for t, size in sizes.items():
            if not 0 <= t < schedule.num_timesteps:
                raise ValueError(
                    f"ScoreMachine: patch_sizes must be of timesteps in [0, {schedule.num_timesteps}), got {t}"
                )
            if size < 1 or size % 2 == 0:
                raise ValueError(f"ScoreMachine: patch_sizes must be odd and positive, got {size}")
            if machine in ("els", "bbels") and size > LARGEST_PATCH:
                raise ValueError(f"ScoreMachine: patch_sizes of {machine} must be at most {LARGEST_PATCH}, got {size}")
            if machine == "els" and size > min(images.shape[2:]):
                raise ValueError(
                    f"ScoreMachine: patch_sizes of els must not exceed the images' {min(images.shape[2:])} pixels, got {size}"
                )
        self.schedule, self.machine, self.sizes, self.backend = schedule, machine, dict(sorted(sizes.items())), backend
        self.register_buffer("images", images)
        # No weight: it says in which dtype, and with the images on which device, a sampler has to work.
        self.working = nn.Parameter(torch.empty(0, dtype=torch.float32, device=images.device), requires_grad=False)

    def extra_repr(self) -> str:
        """Everything but the images that decides the output; what samples are stored with."""
        return f"{self.machine}, {self.sizes}, {self.schedule}"

    def patch_size(self, timestep: int) -> int:
        """p at a timestep."""
        return self.sizes[max((t for t in self.sizes if t <= timestep), default=min(self.sizes))]

    @torch.no_grad()  # patch_mean has no derivative, and the rest of eps alone would be a wrong one
    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise in an image, as a network would predict it.

        Args:
            noisy: x_t, [B, C, H, W].
            timesteps: t, [B].

        Returns:
            eps, [B, C, H, W] in the dtype of ``noisy``; not differentiable.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        shape = list(timesteps.shape) if isinstance(timesteps, Tensor) else timesteps
        if shape != [len(noisy)]:
            raise ValueError(f"ScoreMachine: timesteps must have shape [{len(noisy)}], got {shape}")
        if timesteps.is_floating_point():
            raise TypeError(f"ScoreMachine: timesteps must be integers, got {timesteps.dtype}")
        out = torch.empty_like(noisy)
        for t in timesteps.unique().tolist():
            rows = timesteps == t
            scale, sigma = self._levels(t)
            x = noisy[rows].float()
            out[rows] = ((x - scale * self.denoise(x, t)) / sigma).to(noisy.dtype)
        return out

    @torch.no_grad()
    def denoise(self, noisy: Tensor, timestep: int) -> Tensor:
        """The mean of what could be under the noise.

        Args:
            noisy: x_t, [B, C, H, W], on the device of the training images.
            timestep: t.

        Returns:
            x0, [B, C, H, W] float32, in the range of the training images; not differentiable.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        if not isinstance(noisy, Tensor):
            raise TypeError(f"ScoreMachine: noisy must be a tensor, got {type(noisy).__name__}")
        if noisy.dim() != 4 or noisy.shape[1:] != self.images.shape[1:]:
            shape = ", ".join(map(str, self.images.shape[1:]))
            raise ValueError(f"ScoreMachine: noisy must have shape [B, {shape}], got {list(noisy.shape)}")
        scale, sigma = self._levels(timestep)
        size, noisy = self.patch_size(timestep), noisy.float()
        if self.machine in ("ls", "is"):
            return self._same_place(noisy, size if self.machine == "ls" else None, scale, sigma)
        border = "class"
        if self.machine == "els":
            # As many windows as pixels: the query goes on round its edges.
            half, border = size // 2, "inside"
            noisy = nn.functional.pad(noisy, (half, half, half, half), mode="circular")
        images = self.images.float() if self.images.dtype == torch.float64 else self.images  # .double() was called
        return patch_mean(
            noisy, images, patch_size=size, sigma=sigma, scale=scale, border=border, backend=self.backend
        ).mean.float()

    def _levels(self, timestep: int) -> tuple[float, float]:
        timestep = _timestep(timestep, "ScoreMachine: timestep")
        if not 0 <= timestep < self.schedule.num_timesteps:
            raise ValueError(f"ScoreMachine: timestep must lie in [0, {self.schedule.num_timesteps}), got {timestep}")
        abar = float(self.schedule.alphas_cumprod[timestep])
        return math.sqrt(abar), math.sqrt(1 - abar)

    def _same_place(self, noisy: Tensor, size: int | None, scale: float, sigma: float) -> Tensor:  # [B, C, H, W]
        """Each pixel against the same pixel of every training image; whole images where ``size`` is None."""
        out = []
        rows = max(1, _BLOCK // self.images[0].numel())
        for x in noisy:
            # Sums relative to the smallest distance so far, which later blocks may lower.
            nearest = torch.full(x.shape[1:], torch.inf, dtype=torch.float64, device=x.device)
            total, mean = torch.zeros_like(nearest), torch.zeros_like(x, dtype=torch.float64)
            for block in self.images.split(rows):
                y = to_unit(block, x)  # [n, C, H, W]
                squares = (x - scale * y).square().sum(1, dtype=torch.float64)  # [n, H, W]
                distances = squares.sum((1, 2), keepdim=True) if size is None else _box(squares, size)
                least = torch.minimum(nearest, distances.amin(0))
                kept = ((least - nearest) / (2 * sigma**2)).exp()
                weights = ((least - distances) / (2 * sigma**2)).exp()  # [n, H, W]
                total = total * kept + weights.sum(0)
                mean = mean * kept + (weights[:, None] * y).sum(0)
                nearest = least
            out.append((mean / total).float())
        return torch.stack(out) if out else torch.empty_like(noisy)


def default_patch_sizes(schedule: Schedule, side: int) -> dict[int, int]:
    """p where nobody calibrated: from 3 pixels to about half the side as the noise drowns the image.

    ``p = 3 + (side / 2 - 3) (1 - abar_t)``, to the nearest odd number, not above ``side`` or 511. What a network looks at grows
    with the noise in this way; the figures are a rule of thumb, and :func:`calibrate` finds a network's own.

    Args:
        schedule: of the diffusion.
        side: of the images, in pixels.

    Returns:
        ``{t: p}`` for the timesteps at which p changes.
    """
    largest = min(LARGEST_PATCH, side if side % 2 else max(1, side - 1))
    wanted = 3 + max(0.0, side / 2 - 3) * (1 - schedule.alphas_cumprod)
    sizes: dict[int, int] = {}
    for t, p in enumerate(wanted.tolist()):
        size = min(largest, 2 * int((p - 1) / 2 + 0.5) + 1)
        if size not in sizes.values():
            sizes[t] = size
    return sizes


@torch.no_grad()
def calibrate(
    machine: ScoreMachine,
    model: nn.Module,
    timesteps: Iterable[int],
    *,
    sizes: Sequence[int] = tuple(range(3, 19, 2)),
    num_images: int = 10,
    seed: int = 0,
) -> dict[int, int]:
    """The patch size at which the machine agrees most with a trained network, for each timestep.

    Training images are noised, both predict the noise, and the size is the one whose predictions have the largest median cosine
    with the network's; of equals the smallest.

    Args:
        machine: its own patch sizes do not matter and stay.
        model: the network.
        timesteps: where to calibrate, each in [0, T).
        sizes: odd sizes to choose from; for "els" none above the images' shorter side.
        num_images: images, spread evenly over the training images.
        seed: of the noise.

    Returns:
        ``{t: p}``, as :class:`ScoreMachine` takes it.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Kamb and Ganguli 2025, who calibrate sizes 3 to 17 on the median over 10 images.
    """
    if machine.machine == "is":
        raise ValueError("calibrate: machine must see patches, got is")
    for name, values in (("timesteps", timesteps), ("sizes", sizes)):
        if not isinstance(values, Iterable):
            raise TypeError(f"calibrate: {name} must be a sequence, got {values!r}")
    sizes, timesteps = list(sizes), [_timestep(t, "calibrate: each of timesteps") for t in timesteps]
    if num_images < 1 or not sizes:
        raise ValueError(f"calibrate: num_images and sizes must not be empty, got {num_images} and {sizes}")
    chosen = range(0, len(machine.images), max(1, len(machine.images) // num_images))[:num_images]
    clean = to_unit(machine.images[list(chosen)], machine.working)
    found = {}
    with evaluating(model):
        for t in timesteps:
            machine._levels(t)  # refuses a timestep out of range
            ids = torch.arange(len(clean))
            eps = noise(clean.shape[1:], seed=seed, ids=ids, timesteps=t, purpose=PATCHES).to(clean)
            times = torch.full((len(clean),), t, device=clean.device)
            noisy = machine.schedule.add_noise(clean, eps, times)
            theirs = predict_noise(model, noisy, times)
            agreement = {}
            for size in sizes:
                sized = ScoreMachine(
                    machine.images, machine.schedule, machine.machine, patch_sizes=size, backend=machine.backend
                )
                ours = sized(noisy, times)
                agreement[size] = float(nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1)).median())
            found[t] = max(sizes, key=lambda size: (agreement[size], -size))
    return found


def _timestep(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _box(values: Tensor, size: int) -> Tensor:  # [n, H, W] -> [n, H, W]
    """Sums over p x p squares around each element, as far as they lie within."""
    pad = size // 2
    rows = nn.functional.avg_pool2d(values[:, None], (1, size), 1, (0, pad))
    return nn.functional.avg_pool2d(rows, (size, 1), 1, (pad, 0))[:, 0] * size**2
