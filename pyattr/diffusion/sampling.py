"""Generating images by DDIM or DDPM, with every random number kept."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .images import evaluating, predict_noise, reference_parameter, to_bytes
from .noise import SAMPLES, noise
from .progress import Progress, silent
from .schedule import Schedule
from .storage import differences, load_tensors, model_hash, save_tensors

METHODS = ("ddim", "ddpm")
RECORDS = ("noise", "trajectory")


@dataclass(frozen=True, eq=False)
class Samples:
    """Generated images and what they were made from.

    Attributes:
        images: x_0, [Q, C, H, W] float32 in [-1, 1] (when sampled with ``clip``).
        ids: [Q] int64, the numbers that the noise of each image is a function of.
        noise: the exogenous noise, [Q, E, C, H, W] float32: the initial x_T, then whatever each step added, in order. E is 1
            for a deterministic sampler, else the number of steps (the last step adds none).
        trajectory: [Q, S + 1, C, H, W] float32, from x_T to x_0; None unless asked for.
        timesteps: [S] int64, in the order in which they were visited (falling).
        settings: how they were made: method, steps, eta, seed, clip, schedule, model hash.
    """

    images: Tensor
    ids: Tensor
    noise: Tensor
    trajectory: Tensor | None
    timesteps: Tensor
    settings: dict

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice) -> "Samples":
        """The samples of a slice, as views."""
        if not isinstance(which, slice):
            raise TypeError(f"Samples: index must be a slice, got {type(which).__name__}")
        trajectory = None if self.trajectory is None else self.trajectory[which]
        return dataclasses.replace(
            self, images=self.images[which], ids=self.ids[which], noise=self.noise[which], trajectory=trajectory
        )

    def uint8(self) -> Tensor:
        """[Q, C, H, W] uint8, rounded as for an 8-bit image file."""
        return to_bytes(self.images)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all.

        Extra memory: the tensors once more.
        """
        tensors = {"images": self.images, "ids": self.ids, "noise": self.noise, "timesteps": self.timesteps}
        if self.trajectory is not None:
            tensors["trajectory"] = self.trajectory
        save_tensors(path, tensors, {"kind": "samples", **self.settings})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Samples":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError, DamagedFileError: there is none, or its bytes changed.
            ValueError: the file holds something else.
        """
        tensors, settings = load_tensors(path)
        if settings.pop("kind", None) != "samples":
            raise ValueError(f"Samples: {path} does not hold samples")
        return cls(**{"trajectory": None, **tensors}, settings=settings)


def sampling_timesteps(schedule: Schedule, steps: int) -> Tensor:
    """The timesteps visited: multiples of T div S, falling to 0 ("leading" spacing).

    Args:
        steps: S, 1 to T.

    Returns:
        [S] int64.
    """
    if not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(f"sample: steps must lie in [1, {schedule.num_timesteps}], got {steps}")
    return torch.arange(steps - 1, -1, -1) * (schedule.num_timesteps // steps)


def sample(
    model: nn.Module,
    schedule: Schedule,
    *,
    num_images: int | None = None,
    ids=None,
    shape: tuple[int, int, int] | None = None,
    method: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    clip: bool = True,
    record: str = "noise",
    directory: str | os.PathLike | None = None,
    progress: Progress = silent,
) -> Samples:
    """Generate images; image i and its noise are a function of (seed, i) alone, to the rounding of the model's batches.

    At timestep t with e the predicted noise, x0 = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t), clipped to [-1, 1] if ``clip``,
    s = t - T div S the next timestep, abar_s = 1 below zero, and z the exogenous noise:

    DDIM: x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) e + sigma z,
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s); e is not computed again from the clipped x0.

    DDPM: with a = abar_t / abar_s,
    x_s = (sqrt(abar_s) (1 - a) x0 + sqrt(a) (1 - abar_s) x_t) / (1 - abar_t) + sqrt((1 - abar_s) / (1 - abar_t) (1 - a)) z.

    Args:
        model: predicts the noise, ``model(x_t [B, C, H, W], t [B])``; evaluated in eval mode and left in its own.
        num_images: Q, for the ids 0..Q-1; or
        ids: [Q] distinct integers in [0, 2^63).
        shape: (C, H, W); from ``model.config`` when it is there.
        method: "ddim" or "ddpm".
        steps: S; DDPM proper takes S = T.
        eta: DDIM only; 0 is deterministic, 1 adds as much noise as DDPM.
        seed: in [0, 2^32).
        record: "noise" keeps the exogenous noise, "trajectory" every x_t as well.
        directory: each batch is kept there when it is done, and found again by an interrupted call.
        progress: stage "sample", counts images.

    Returns:
        :class:`Samples`, on the CPU.

    Raises:
        ValueError: an argument is not as above, or ``directory`` was made with other settings.

    Extra memory: the result, and the model's for ``batch_size`` images.

    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16; Ho et al. 2020,
    equation 7.
    """
    if method not in METHODS:
        raise ValueError(f"sample: method must be one of {', '.join(METHODS)}, got {method!r}")
    if record not in RECORDS:
        raise ValueError(f"sample: record must be one of {', '.join(RECORDS)}, got {record!r}")
    if not 0 <= eta <= 1 or (eta and method == "ddpm"):
        raise ValueError(f"sample: eta must lie in [0, 1], and be 0 for ddpm, got {eta}")
    if batch_size < 1:
        raise ValueError(f"sample: batch_size must be at least 1, got {batch_size}")
    if (num_images is None) == (ids is None):
        raise ValueError("sample: give either num_images or ids")
    ids = torch.arange(num_images) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or ids.numel() == 0 or len(ids.unique()) != len(ids):
        raise ValueError("sample: ids must be distinct and there must be at least one image")
    shape = tuple(shape) if shape is not None else _shape(model)
    timesteps = sampling_timesteps(schedule, steps)
    settings = {
        "method": method,
        "steps": steps,
        "eta": float(eta),
        "seed": seed,
        "clip": bool(clip),
        "record": record,
        "schedule": dataclasses.asdict(schedule),
        "model": model_hash(model),
    }
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    sampler = _Sampler(model, schedule, shape, timesteps, settings)
    batches, done = [], 0
    with evaluating(model):
        progress(0, len(ids), "sample")
        for batch_ids in ids.split(batch_size):
            path = None if directory is None else Path(directory) / f"samples-{done:08d}.safetensors"
            if path is not None and path.exists():
                batch = _kept(path, batch_ids, settings)
            else:
                batch = sampler.run(batch_ids)
                if path is not None:
                    batch.save(path)
            batches.append(batch)
            done += len(batch_ids)
            progress(done, len(ids), "sample")
    images, noises = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "noise"))
    trajectory = torch.cat([b.trajectory for b in batches]) if record == "trajectory" else None
    return Samples(images, ids, noises, trajectory, timesteps, settings)


def _shape(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    try:
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)
    except (TypeError, KeyError):
        raise ValueError("sample: shape must be given, since the model has no config with its image size") from None


def _kept(path: Path, ids: Tensor, settings: dict) -> Samples:
    kept = Samples.load(path)
    differ = differences(kept.settings, settings)
    if not torch.equal(kept.ids, ids):
        differ = differ or "the ids or the batch size differ"
    if differ:
        raise ValueError(
            f"sample: directory {path.parent} holds samples made otherwise: {differ}; use another directory"
        )
    return kept


class _Sampler:
    """One batch from noise to images. Coefficients are float64 until they meet the image."""

    def __init__(self, model: nn.Module, schedule: Schedule, shape, timesteps: Tensor, settings: dict):
        self.model, self.schedule, self.shape = model, schedule, shape
        self.timesteps, self.settings = timesteps, settings
        self.stride = schedule.num_timesteps // len(timesteps)
        self.stochastic = settings["method"] == "ddpm" or settings["eta"] > 0
        self.like = reference_parameter(model, "sample")

    @torch.no_grad()
    def run(self, ids: Tensor) -> Samples:
        # The label of x_T is T; of the noise added at timestep t it is t.
        labels = [self.schedule.num_timesteps]
        if self.stochastic:
            labels += self.timesteps[:-1].tolist()
        exogenous = noise(
            self.shape, seed=self.settings["seed"], ids=ids[:, None], timesteps=torch.tensor(labels), purpose=SAMPLES
        )  # [B, E, C, H, W]
        x = exogenous[:, 0].to(self.like.device, self.like.dtype)
        trajectory = [x]
        for i, t in enumerate(self.timesteps.tolist()):
            times = torch.full((len(ids),), t, device=x.device)
            z = exogenous[:, i + 1].to(x) if i + 1 < exogenous.shape[1] else None
            x = self._step(x, predict_noise(self.model, x, times), t, z)
            if self.settings["record"] == "trajectory":
                trajectory.append(x)
        kept = torch.stack(trajectory, 1).float().cpu() if self.settings["record"] == "trajectory" else None
        return Samples(x.float().cpu(), ids, exogenous, kept, self.timesteps, self.settings)

    def _step(self, x: Tensor, e: Tensor, t: int, z: Tensor | None) -> Tensor:  # x, e, z [B, C, H, W]
        abar_t = float(self.schedule.alphas_cumprod[t])
        abar_s = float(self.schedule.alphas_cumprod[t - self.stride]) if t >= self.stride else 1.0
        x0 = (x - (1 - abar_t) ** 0.5 * e) / abar_t**0.5
        if self.settings["clip"]:
            x0 = x0.clamp(-1, 1)
        a = abar_t / abar_s
        # DDPM's posterior standard deviation; DDIM's sigma at eta = 1 is the same number.
        spread = ((1 - abar_s) / (1 - abar_t) * (1 - a)) ** 0.5
        if self.settings["method"] == "ddpm":
            x = (abar_s**0.5 * (1 - a) * x0 + a**0.5 * (1 - abar_s) * x) / (1 - abar_t)
        else:
            spread *= self.settings["eta"]
            x = abar_s**0.5 * x0 + (1 - abar_s - spread**2) ** 0.5 * e
        return x if z is None else x + spread * z
