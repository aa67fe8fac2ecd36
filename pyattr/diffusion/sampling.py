"""Generating images step by step, with every random number kept."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops._arguments import check_integer
from .checkpoint import identity
from .conditioned import check_conditions, with_conditions
from .images import evaluating, predict_noise, reference_parameter, to_bytes
from .noise import SAMPLES, noise
from .progress import Pace, Progress, silent
from .schedule import Schedule, check_schedule
from .steps import METHODS
from .steps import steps as steps_of
from .storage import DamagedFileError, differences, load_tensors, save_tensors

RECORDS = ("noise", "trajectory")
HELD = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
SAVE_SECONDS = 30.0  # between the states of a batch that are kept


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
        settings: how they were made: method, steps, eta, seed, clip, shape, schedule, and what identifies the model.
        conditions: [Q] int64, what a conditional model was told of each; None for another.
    """

    images: Tensor
    ids: Tensor
    noise: Tensor
    trajectory: Tensor | None
    timesteps: Tensor
    settings: dict
    conditions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice) -> "Samples":
        """The samples of a slice, as views."""
        if not isinstance(which, slice):
            raise TypeError(f"Samples: index must be a slice, got {type(which).__name__}")
        rows = {name: getattr(self, name) for name in ("images", "ids", "noise", "trajectory", "conditions")}
        return dataclasses.replace(self, **{name: None if t is None else t[which] for name, t in rows.items()})

    def uint8(self) -> Tensor:
        """[Q, C, H, W] uint8, rounded as for an 8-bit image file."""
        return to_bytes(self.images)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all.

        Extra memory: the tensors once more.
        """
        tensors = {"images": self.images, "ids": self.ids, "noise": self.noise, "timesteps": self.timesteps}
        for name in ("trajectory", "conditions"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
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


def num_noises(method: str, steps: int, eta: float) -> int:
    """E, the slices of exogenous noise of an image: x_T, and one for each step that adds noise; the last adds none."""
    return steps if method != "ddim" or eta > 0 else 1


def sample(
    model: nn.Module,
    schedule: Schedule,
    *,
    num_images: int | None = None,
    ids=None,
    conditions=None,
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

    Published, by the code of Dai and Gifford, in whose terms a is alpha_t and 1 - a is beta_t when S = T; x0 plays no part, and
    the last x alone is clipped:
    x_s = (x_t - (1 - a) / sqrt(1 - abar_t) e) / sqrt(a) + sqrt(a (1 - a)) z.

    Args:
        model: predicts the noise, ``model(x_t [B, C, H, W], t [B])``, a conditional one
            ``model(x_t, t, conditions [B])``; evaluated in eval mode and left in its own.
        num_images: Q, for the ids 0..Q-1; or
        ids: [Q] distinct integers in [0, 2^63).
        conditions: [Q] integers, what a conditional model is told of each image; None for another model.
        shape: (C, H, W); from ``model.config`` when it is there.
        method: "ddim", "ddpm" or "published".
        steps: S; the latter two proper take S = T.
        eta: DDIM only; 0 is deterministic, 1 adds as much noise as DDPM.
        seed: in [0, 2^32).
        record: "noise" keeps the exogenous noise, "trajectory" every x_t as well.
        directory: each batch is kept there when it is done, and a batch at work every half minute (seldomer where that takes
            long), so that an interrupted call goes on from there.
        progress: stage "sample", counts steps of images: S for each image.

    Returns:
        :class:`Samples`, on the CPU. A resumed call gives the bits of an uninterrupted one on the same machine and thread
        count.

    Raises:
        TypeError: num_images is no integer; or there are conditions where the model takes none, or none where it does.
        ValueError: an argument is not as above, the model has a schedule of its own and it is another, or ``directory`` was
            made with other settings.

    Extra memory: the result, the share of it that ``batch_size`` images have once more (twice where there is a directory),
    and the model's for them.

    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16; Ho et al. 2020,
    equation 7; Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174, and their code.
    """
    timesteps = check_options(schedule, method=method, steps=steps, eta=eta, seed=seed, batch_size=batch_size)
    check_schedule(model, schedule, "sample")
    if record not in RECORDS:
        raise ValueError(f"sample: record must be one of {', '.join(RECORDS)}, got {record!r}")
    if (num_images is None) == (ids is None):
        raise ValueError("sample: give either num_images or ids")
    if num_images is not None:
        num_images = check_integer("sample", "num_images", num_images, 1, 2**62)
    ids = torch.arange(num_images) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or ids.numel() == 0 or len(ids.unique()) != len(ids):
        raise ValueError("sample: ids must be distinct and there must be at least one image")
    if conditions is not None:
        conditions = with_conditions(torch.empty(len(ids), 1, 1, 1), conditions).conditions
    check_conditions(model, with_conditions(torch.empty(len(ids), 1, 1, 1), conditions), "sample", "images")
    if clip and getattr(model, "latents", False):
        raise ValueError("sample: clip must be False for a model of latents, which have no range to be clipped to")
    shape = tuple(shape) if shape is not None else _shape(model)
    settings = {
        "method": method,
        "steps": steps,
        "eta": float(eta),
        "seed": seed,
        "clip": bool(clip),
        "record": record,
        "shape": list(shape),
        "schedule": dataclasses.asdict(schedule),
        **identity(model),
    }
    if directory is not None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(model, schedule, timesteps, settings)
    # The batches are copied into the whole as they come, so that they need not all be held twice.
    images = torch.empty(len(ids), *shape, **HELD)
    noises = torch.empty(len(ids), 1 + len(sampler.noisy_steps), *shape, **HELD)
    trajectory = torch.empty(len(ids), steps + 1, *shape, **HELD) if record == "trajectory" else None
    done = 0

    def count(batch_steps: int) -> None:
        progress(done * steps + batch_steps, len(ids) * steps, "sample")

    with evaluating(model):
        for batch_ids in ids.split(batch_size):
            told = None if conditions is None else conditions[done : done + len(batch_ids)]
            path, unfinished = (
                None if directory is None else directory / f"{kind}-{done:08d}.safetensors"
                for kind in ("samples", "unfinished")
            )
            found = path is not None and path.exists()
            batch = _kept(path, batch_ids, settings, told) if found else sampler.run(batch_ids, unfinished, count, told)
            if path is not None:
                if not found:
                    batch.save(path)
                unfinished.unlink(missing_ok=True)
            rows = slice(done, done + len(batch))
            images[rows], noises[rows] = batch.images, batch.noise
            if trajectory is not None:
                trajectory[rows] = batch.trajectory
            done += len(batch)
            del batch  # or it would lie beside the next one
            if not found or done == len(ids):  # what was found is no measure of how fast the work goes
                count(0)
    return Samples(images, ids, noises, trajectory, timesteps, settings, conditions)


def check_options(schedule: Schedule, *, method: str, steps: int, eta: float, seed: int, batch_size: int) -> Tensor:
    """Refuse options of :func:`sample` that it cannot take.

    Returns:
        The timesteps visited, [S] int64.

    Raises:
        ValueError: the message names the option.
    """
    if method not in METHODS:
        raise ValueError(f"sample: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 <= eta <= 1 or (eta and method != "ddim"):
        raise ValueError(f"sample: eta must lie in [0, 1], and be 0 for ddpm and published, got {eta}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"sample: seed must lie in [0, {2**32 - 1}], got {seed}")
    if batch_size < 1:
        raise ValueError(f"sample: batch_size must be at least 1, got {batch_size}")
    return sampling_timesteps(schedule, steps)


def _shape(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    try:
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)
    except (TypeError, KeyError):
        raise ValueError("sample: shape must be given, since the model has no config with its image size") from None


def _kept(path: Path, ids: Tensor, settings: dict, conditions: Tensor | None) -> Samples:
    kept = Samples.load(path)
    _check_same(path, (kept.ids, kept.conditions), (ids, conditions), kept.settings, settings)
    return kept


def _check_same(path: Path, made_of: tuple, asked_of: tuple, made: dict, asked: dict) -> None:
    """Refuse a file of other ids, conditions or settings."""
    differ = differences(made, asked)
    (made_ids, made_conditions), (ids, conditions) = made_of, asked_of
    if not torch.equal(made_ids, ids):
        differ = differ or "the ids or the batch size differ"
    if (made_conditions is None) != (conditions is None) or (
        conditions is not None and not torch.equal(made_conditions, conditions)
    ):
        differ = differ or "the conditions differ"
    if differ:
        raise ValueError(
            f"sample: directory {path.parent} holds samples made otherwise: {differ}; use another directory"
        )


class Sampler:
    """A batch at a time from noise to images.

    Args:
        model: predicts the noise, in the mode it has.
        timesteps: [S] int64, falling.
        settings: with the method, eta, clip, record, seed and shape of :func:`sample`; stored with what is made.

    Attributes:
        steps: what is done at each timestep.
        like: the parameter whose dtype and device the images take.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, timesteps: Tensor, settings: dict):
        self.model, self.schedule = model, schedule
        self.timesteps, self.settings = timesteps, settings
        method, eta, clip = (settings[name] for name in ("method", "eta", "clip"))
        self.steps = steps_of(schedule, timesteps.tolist(), method=method, eta=eta, clip=clip)
        self.noisy_steps = timesteps[: num_noises(method, len(timesteps), eta) - 1].tolist()
        self.like = reference_parameter(model, "sample")

    def times(self, number: int, count: int) -> Tensor:  # -> [B] int64
        """The timestep of a step, once for each image."""
        return torch.full((count,), int(self.timesteps[number]), device=self.like.device)

    def place(self, images: Tensor) -> Tensor:
        """Images or noise on the model's device and in its dtype."""
        return images.to(self.like.device, self.like.dtype)

    def run(
        self,
        ids: Tensor,
        unfinished: Path | None,
        count: Callable[[int], None],
        conditions: Tensor | None = None,
    ) -> Samples:
        """A batch; see :meth:`walk`.

        Args:
            ids: [B] int64.
            conditions: [B] int64, for a conditional model.
        """
        shape, seed = self.settings["shape"], self.settings["seed"]
        # The label of x_T is T; of the noise added at timestep t it is t.
        labels = torch.tensor([self.schedule.num_timesteps, *self.noisy_steps])
        exogenous = noise(shape, seed=seed, ids=ids[:, None], timesteps=labels, purpose=SAMPLES)  # [B, E, C, H, W]
        trajectory = None
        if self.settings["record"] == "trajectory":
            trajectory = torch.empty(len(ids), len(self.timesteps) + 1, *shape, **HELD)  # [B, S + 1, C, H, W]
        x = self.walk(exogenous, slice(None), ids, unfinished, count, trajectory, conditions=conditions)
        return Samples(x, ids, exogenous, trajectory, self.timesteps, self.settings, conditions)

    @torch.no_grad()
    def walk(
        self,
        exogenous: Tensor,
        rows: Tensor | slice,
        ids: Tensor,
        unfinished: Path | None,
        count: Callable[[int], None],
        trajectory: Tensor | None = None,
        steps: int | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """From the noise to the image; its state goes to the file ``unfinished`` now and then, and is taken up from there.

        Args:
            exogenous: [R, E, C, H, W].
            rows: which of them is the noise of which image.
            ids: [B] int64, what a state is known by.
            count: told how many steps of images are done in this batch, but for the last.
            trajectory: [B, S + 1, C, H, W], written to.
            steps: how many are done; None: all.
            conditions: [B] int64, for a conditional model.

        Returns:
            [B, C, H, W] float32 on the CPU.
        """
        x = self.place(exogenous[:, 0][rows])
        first, steps = 0, len(self.steps) if steps is None else steps
        if trajectory is not None:
            trajectory[:, 0] = x
        if unfinished is not None:
            first, x = self._resume(unfinished, ids, x, trajectory, conditions)
        told = () if conditions is None else (conditions.to(self.like.device),)
        pace = Pace(SAVE_SECONDS)
        count(first * len(ids))
        for i in range(first, steps):
            z = self.place(exogenous[:, i + 1][rows]) if i + 1 < exogenous.shape[1] else None
            x = self.steps[i].apply(x, predict_noise(self.model, x, self.times(i, len(x)), *told), z)
            if trajectory is not None:
                trajectory[:, i + 1] = x
            if i + 1 < steps:
                if unfinished is not None and pace.due():
                    with pace.saving():
                        self._save(unfinished, ids, i + 1, x, trajectory, conditions)
                count((i + 1) * len(ids))
        return x.float().cpu()

    def _save(
        self, path: Path, ids: Tensor, steps: int, x: Tensor, trajectory: Tensor | None, conditions: Tensor | None
    ) -> None:
        tensors = {"x": x, "ids": ids} if conditions is None else {"x": x, "ids": ids, "conditions": conditions}
        if trajectory is not None:
            tensors["trajectory"] = trajectory[:, : steps + 1]
        save_tensors(path, tensors, {"kind": "unfinished samples", "steps": steps, "settings": self.settings})

    def _resume(
        self, path: Path, ids: Tensor, x: Tensor, trajectory: Tensor | None, conditions: Tensor | None
    ) -> tuple[int, Tensor]:
        """How many steps are done, and x after them."""
        try:
            tensors, found = load_tensors(path)
        except (FileNotFoundError, DamagedFileError):
            return 0, x  # the batch is made from its beginning, and the file replaced
        made_of = tensors["ids"], tensors.get("conditions")
        _check_same(path, made_of, (ids, conditions), found["settings"], self.settings)
        if trajectory is not None:
            trajectory[:, : found["steps"] + 1] = tensors["trajectory"]
        return found["steps"], tensors["x"].to(x)
