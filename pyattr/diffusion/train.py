"""Training a noise-predicting network so that an interrupted run ends at the same bits."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import architecture, checkpoints, identity, numbered
from .conditioned import Conditioned, Examples, as_examples, check_conditions, examples_hash, separate
from .images import predict_noise, reference_parameter, to_unit
from .progress import Pace, Progress, silent
from .schedule import Schedule, check_schedule
from .storage import DamagedFileError, data_hash, differences, load_tensors, save_tensors

WEIGHTINGS = ("simple", "velocity")
SAVE_SECONDS = 60.0  # between states that are kept, where checkpoints are further apart
_ORDER, _STEP = 0x6F72646572, 0x73746570  # key word 1 of the data order and of the draws of a step


@dataclass(frozen=True, eq=False)
class Training:
    """The outcome of :func:`train`.

    Attributes:
        model: the model that was passed in, in eval mode, with its final weights (their moving average if asked for).
        losses: [steps] float32, the weighted mean squared error of each step's batch.
        resumed_from: the step of the checkpoint that this call went on from; 0 if it started anew.
    """

    model: nn.Module
    losses: Tensor
    resumed_from: int


def train(
    model: nn.Module,
    images,
    *,
    schedule: Schedule,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.95, 0.999),
    weight_decay: float = 1e-6,
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    flip: bool = False,
    ema: float | None = None,
    weighting: str = "simple",
    seed: int = 0,
    checkpoint_directory: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int | None = 2,
    progress: Progress = silent,
) -> Training:
    """Minimise ``E_{x, t, eps} w_t mean (e_theta(x_t, t) - eps)^2`` over the images.

    AdamW; the learning rate rises linearly over the first ``ceil(warmup * steps)`` steps, then falls to 0 along a cosine.
    Batches go through a new permutation of the images each epoch, the last one of an epoch being short. Order, flips,
    timesteps, noise and dropout are functions of (seed, step), so nothing random has to be saved.

    Args:
        model: predicts the noise; trained in place, on its device.
        images: [N, C, H, W] uint8, or floating point in [-1, 1]; for a conditional model
            :class:`~pyattr.diffusion.Conditioned`.
        steps: optimiser steps in all.
        learning_rate: its peak, reached at the last step of the warmup.
        warmup: fraction of ``steps``, in [0, 1].
        max_grad_norm: gradients are scaled down to this norm.
        flip: mirror each image left to right with probability 1/2; conditioned ones by their ``mirrored``.
        ema: decay of a moving average of the weights, in (0, 1), that replaces them in the end; it starts faster,
            at step s with min(ema, (1 + s) / (10 + s)). None: no average.
        weighting: "simple" is w_t = 1. "velocity" is w_t = 1 / abar_t, which makes the loss the squared error of the
            velocity ``sqrt(abar_t) eps - sqrt(1 - abar_t) x``: the noisy half of the timesteps, where an image is laid
            out, then weighs as much as the other, which a short training needs. For networks that predict the noise
            through the velocity; the error of another's e is multiplied by up to 1 / abar_T, 25,000 by default.
        seed: in [0, 2^32).
        checkpoint_directory: where checkpoints go, and where an interrupted run is taken up. Weights, average, optimiser
            and losses lie in ``checkpoint-<step>.safetensors``, written whole. Where checkpoints are more than a minute
            apart, ``resume-<step>.safetensors`` holds the same each minute (seldomer where writing it takes more than three
            seconds), until the next checkpoint.
        checkpoint_every: steps between checkpoints; ceil(steps / 20) if None. The last step always makes one.
        keep_checkpoints: how many of the newest to keep; None keeps all (TracIn reads several).
        progress: stage "train", counts steps.

    Returns:
        :class:`Training`. A resumed run equals an uninterrupted one bit for bit on the same machine and thread count.

    Raises:
        TypeError, ValueError: an argument is not as above, or the directory holds checkpoints of another run; the message says
            what differs. The model to start from counts as a setting, so build it from a fixed seed.
        RuntimeError: the loss is not finite.

    Extra memory: gradients and three copies of the weights (four with ``ema``), one batch.

    Source: Ho et al. 2020, algorithm 1; the optimiser and its schedule as in D-TRAK (Zheng et al., ICLR 2024); the
    velocity's weighting, "SNR + 1", Salimans, Ho, ICLR 2022, section 4.
    """
    images = as_examples(images, "train", "images")
    if len(images) == 0:
        raise ValueError("train: images must hold at least one image, got none")
    check_options(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        betas=betas,
        warmup=warmup,
        ema=ema,
        weighting=weighting,
        seed=seed,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
    )
    reference_parameter(model, "train")
    check_schedule(model, schedule, "train")
    check_conditions(model, images, "train", "images")
    mirrored = images.mirrored if flip and isinstance(images, Conditioned) else None
    if flip and isinstance(images, Conditioned) and mirrored is None:
        raise ValueError("train: images must have a mirrored side where flip is set, got Conditioned without")
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "betas": list(betas),
        "weight_decay": weight_decay,
        "warmup": warmup,
        "max_grad_norm": max_grad_norm,
        "flip": bool(flip),
        "ema": ema,
        "weighting": weighting,
        "seed": seed,
        "schedule": dataclasses.asdict(schedule),
        **{f"initial {name}": value for name, value in identity(model).items()},
        "images": examples_hash(images),
        **({} if mirrored is None else {"mirrored": data_hash(mirrored)}),
    }
    run = _Run(model, images, schedule, settings)
    resumed = 0
    if checkpoint_directory is not None:
        checkpoint_directory = Path(checkpoint_directory)
        checkpoint_directory.mkdir(parents=True, exist_ok=True)
        resumed = run.resume(checkpoint_directory)
    every, pace = checkpoint_every or -(-steps // 20), Pace(SAVE_SECONDS)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        progress(resumed, steps, "train")
        for step in range(resumed, steps):
            run.step(step)
            if checkpoint_directory is not None:
                if (step + 1) % every == 0 or step + 1 == steps:
                    with pace.saving():
                        run.save_checkpoint(checkpoint_directory, step + 1, keep_checkpoints)
                elif pace.due():
                    with pace.saving():
                        run.save(checkpoint_directory, "resume", step + 1)
            progress(step + 1, steps, "train")
    except BaseException:
        for module, mode in modes:
            module.training = mode
        raise
    run.finish()
    return Training(model.eval(), run.losses.cpu(), resumed)


def check_options(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    betas: tuple[float, float],
    warmup: float,
    ema: float | None,
    weighting: str,
    seed: int,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    checkpoint_every: int | None = None,
    keep_checkpoints: int | None = None,
) -> None:
    """Refuse options of :func:`train` that it cannot take.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"train: {name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"train: {name} must be at least 1, got {value}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"train: learning_rate must be positive, got {learning_rate}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"train: betas must be two numbers in [0, 1), got {betas}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"train: warmup must lie in [0, 1], got {warmup}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"train: ema must lie in (0, 1), got {ema}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"train: weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"train: seed must lie in [0, {2**32 - 1}], got {seed}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"train: weight_decay must not be negative, got {weight_decay}")
    if not max_grad_norm > 0:
        raise ValueError(f"train: max_grad_norm must be positive, got {max_grad_norm}")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"train: checkpoint_every must be at least 1, got {checkpoint_every}")
    if keep_checkpoints is not None and keep_checkpoints < 1:
        raise ValueError(f"train: keep_checkpoints must be at least 1 or None, got {keep_checkpoints}")


def _rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Random numbers of one epoch or step, independent of all others."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, number]))


def _seed_dropout(device: torch.device, seed: int) -> None:
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class _Run:
    """The state of a training run: model, optimiser, average, losses."""

    def __init__(self, model: nn.Module, images: Examples, schedule: Schedule, settings: dict):
        self.model, self.images, self.schedule, self.settings = model, images, schedule, settings
        self.like = reference_parameter(model, "train")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings["learning_rate"],
            betas=settings["betas"],
            weight_decay=settings["weight_decay"],
            fused=True,  # on the CPU, the others work one small tensor at a time
        )
        self.average = None
        if settings["ema"] is not None:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.losses = torch.zeros(settings["steps"], device=self.like.device)
        self.order = (None, None)  # the epoch whose permutation is at hand, and the permutation

    def batch(self, step: int) -> Tensor:  # -> [B] int64
        """Which images a step sees."""
        count, size = len(self.images), self.settings["batch_size"]
        epoch, position = divmod(step, -(-count // size))
        if self.order[0] != epoch:
            self.order = epoch, torch.from_numpy(_rng(self.settings["seed"], _ORDER, epoch).permutation(count))
        return self.order[1][position * size : (position + 1) * size]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        steps = self.settings["steps"]
        warmup = math.ceil(self.settings["warmup"] * steps)
        if step < warmup:
            return self.settings["learning_rate"] * (step + 1) / warmup
        return self.settings["learning_rate"] * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def step(self, step: int) -> None:
        rng = _rng(self.settings["seed"], _STEP, step)
        batch = self.images[self.batch(step).to(self.images.device)]
        images, conditions = separate(batch)
        told = () if conditions is None else (conditions.to(self.like.device),)
        x = to_unit(images, self.like)  # [B, C, H, W]
        if self.settings["flip"]:
            mirrored = torch.from_numpy(rng.random(len(x)) < 0.5).to(x.device)
            other = to_unit(batch.mirrored, self.like) if isinstance(batch, Conditioned) else x.flip(3)
            x = torch.where(mirrored[:, None, None, None], other, x)
        t = torch.from_numpy(rng.integers(self.schedule.num_timesteps, size=len(x)))  # [B]
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
        noisy = self.schedule.add_noise(x, eps, t)
        devices = [] if x.device.type == "cpu" else [x.device]
        with torch.random.fork_rng(devices):
            _seed_dropout(x.device, int(rng.integers(2**63)))
            errors = (predict_noise(self.model, noisy, t.to(x.device), *told) - eps).square().mean((1, 2, 3))  # [B]
        if self.settings["weighting"] == "velocity":
            errors = errors / self.schedule.alphas_cumprod[t].to(errors)
        loss = errors.mean()
        self.losses[step] = loss.detach()
        if step % 32 == 31:  # seldom, since it waits for the device
            self.check()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings["max_grad_norm"])
        self.optimizer.step()
        if self.average is not None:
            decay = min(self.settings["ema"], (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def check(self) -> None:
        """Refuse to go on from a loss that is not finite."""
        bad = (~torch.isfinite(self.losses)).nonzero()
        if len(bad):
            step = int(bad[0])
            raise RuntimeError(f"train: the loss is {float(self.losses[step])} at step {step}: lower learning_rate")

    def save_checkpoint(self, directory: Path, step: int, keep: int | None) -> None:
        self.save(directory, "checkpoint", step)
        # A damaged one of a later step does not count, and is written again when its step comes.
        so_far = [path for other, path in checkpoints(directory).items() if other <= step]
        for path in [] if keep is None else so_far[:-keep]:
            path.unlink()

    def save(self, directory: Path, kind: str, step: int) -> None:
        """Write the whole state to ``<kind>-<step>.safetensors``; an older state to resume from is then of no use."""
        self.check()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors["losses"] = self.losses[:step]
        record = {"kind": "checkpoint", "step": step, "settings": self.settings, "model": architecture(self.model)}
        path = directory / f"{kind}-{step:08d}.safetensors"
        older = set(numbered(directory, "resume").values()) - {path}
        save_tensors(path, tensors, record)
        for other in older:
            other.unlink()

    def resume(self, directory: Path) -> int:
        """Load the newest sound state; the step to go on from."""
        states = [*numbered(directory, "resume").items(), *checkpoints(directory).items()]
        for step, path in sorted(states, reverse=True):
            try:
                tensors, record = load_tensors(path)
            except DamagedFileError:
                continue  # an older one is as good, only further back
            differ = differences(record["settings"], self.settings)
            if differ:
                raise ValueError(
                    f"train: {directory} holds checkpoints of another run: {differ}; use another directory or delete them"
                )
            self._load(tensors)
            return step
        return 0

    def _load(self, tensors: dict[str, Tensor]) -> None:
        def under(prefix):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(under("model."))
        state = {}
        for number, name in enumerate(self.parameters):
            values = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if values["step"] is not None:  # a parameter that never had a gradient has no state
                state[number] = values
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name, tensor in under("average.").items():
            self.average[name].copy_(tensor)
        losses = tensors["losses"]
        self.losses[: len(losses)] = losses

    def finish(self) -> None:
        self.check()
        if self.average is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.average[name])
