"""Per-sample gradient features of a diffusion model, saved as they are made."""

import dataclasses
import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import gradients
from .checkpoint import identity
from .conditioned import Examples, as_examples, check_conditions, contents, separate, with_conditions
from .images import evaluating, predict_noise, reference_parameter, to_unit
from .losses import Loss, as_loss
from .noise import MAX_DRAWS, noise
from .progress import Progress, silent
from .schedule import Schedule
from .storage import tensors_hash
from .store import FeatureDirectory, Features, open_features

__all__ = ["STRATEGIES", "FeatureMap", "Features", "compute", "open_features"]

STRATEGIES = ("uniform", "cumulative", "midpoint")
MEMORY = 2 << 30  # bytes for the gradients of a batch
_DEFINITION = 1  # of the features; a change that moves their values by more than rounding raises it
_UNEVEN = 2  # likewise, of timesteps that are not equally far apart


@dataclass(frozen=True)
class FeatureMap:
    """What a feature is: ``phi(x) = M (1 / K) sum_{t in S} grad_theta f(x_t, t)``.

    ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps`` with eps a function of (noise_seed, sample id, t), M the D x P matrix of
    the projection, unscaled: inner products come out D times those of the gradients. The average over timesteps (and draws
    of the noise) is taken before projecting. The model is in eval mode.

    With ``normalize`` every gradient counts by its direction: ``phi(x) = M (1 / K) sum_t g_t / ||g_t||`` with
    ``g_t = grad_theta f(x_t, t)`` and its exact norm, over all parameters, before it is projected; a gradient of zero adds
    nothing. Timesteps with large gradients then weigh no more than others, and f is free of scale. It costs each gradient
    twice, and one projection still.

    Args:
        schedule: gives abar_t and T.
        loss: f, a :class:`~pyattr.diffusion.Loss` or its name.
        num_timesteps: K, 1 to T.
        strategy: S: "uniform" is {k T div K}, "midpoint" {(2 k + 1) T div 2 K}, "cumulative" {k}, with k = 0..K-1. Where K
            divides T, uniform is the published {0, T / K, 2 T / K, ...}; where it does not, all of T is still covered. With few
            timesteps, the first of a uniform choice, where there is next to no noise to predict, is a large part of it;
            midpoint lies half a step later.
        num_noises: independent draws of eps at each timestep.
        proj_dim: D.
        kind: of the projection: "rademacher", "gaussian", "sparse" or "multisketch", see
            :func:`pyattr.gradients.project_gradients`.
        seed: of the projection, in [0, 2^32).
        noise_seed: in [0, 2^32).
        normalize: divide the gradient of each timestep and draw by its norm.

    Raises:
        ValueError: an argument is not as above.

    Source: Zheng et al., ICLR 2024 (D-TRAK), section 3; Park et al., ICML 2023 (TRAK), section 3.2; normalised as in the
    code of Lin, Tao, Dong, Xu, "Diffusion Attribution Score", ICLR 2025, which adds 10^-8 to the norm.
    """

    schedule: Schedule
    loss: Loss | str = "square"
    num_timesteps: int = 10
    strategy: str = "uniform"
    num_noises: int = 1
    proj_dim: int = 4096
    kind: str = "rademacher"
    seed: int = 0
    noise_seed: int = 0
    normalize: bool = False

    def __post_init__(self):
        object.__setattr__(self, "loss", as_loss(self.loss))
        limits = {
            "num_timesteps": (1, self.schedule.num_timesteps),
            "num_noises": (1, MAX_DRAWS),
            "proj_dim": (1, 2**32),
            "seed": (0, 2**32 - 1),
            "noise_seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"FeatureMap: {name} must lie in [{low}, {high}], got {getattr(self, name)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"FeatureMap: strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.kind not in gradients.KINDS:
            raise ValueError(f"FeatureMap: kind must be one of {', '.join(gradients.KINDS)}, got {self.kind!r}")

    def timesteps(self) -> Tensor:
        """S, [K] int64, rising."""
        steps, total = torch.arange(self.num_timesteps), self.schedule.num_timesteps
        if self.strategy == "cumulative":
            return steps
        return (2 * steps + (self.strategy == "midpoint")) * total // (2 * self.num_timesteps)

    def settings(self) -> dict:
        """All fields, as they go into the manifest of a directory.

        ``normalize`` only where it is set: directories from before it existed are found again. Those of timesteps that are not
        equally far apart are not, since they once were others.
        """
        uneven = self.strategy != "cumulative" and self.schedule.num_timesteps % self.num_timesteps != 0
        fields = {**dataclasses.asdict(self), "definition": _UNEVEN if uneven else _DEFINITION}
        return fields if self.normalize else {name: value for name, value in fields.items() if name != "normalize"}

    def batch(
        self,
        model: nn.Module,
        images: Examples,
        ids: Tensor,
        *,
        timesteps_per_pass: int = 32,
        memory: int = MEMORY,
    ) -> Tensor:
        """Features of a batch.

        Args:
            model: in eval mode.
            images: [B, C, H, W] uint8, or floating point in [-1, 1]; or [B, K, C, H, W], another one for each timestep. For a
                conditional model :class:`~pyattr.diffusion.Conditioned`.
            ids: [B] int64.
            timesteps_per_pass: rows of one image that go through the model together, at most; changes rounding only.
            memory: bytes that the gradients may take (:func:`pyattr.gradients.project_gradients`). Fewer rows and images
                go through the model together to stay within it; changes rounding only.

        Returns:
            [B, D] float32 (float64 for a float64 model), on the model's device.

        Raises:
            ValueError: ``memory`` is too small for one row of one image.

        Extra memory: ``memory``, and the images with their noise once for each row of a pass.
        """
        x, times = self._views(model, images), self._times()
        loss = functools.partial(_values, loss=self._function(), schedule=self.schedule)
        count = min(timesteps_per_pass, len(times))
        if count > 1:
            # Two images at a time are measured, so half of the budget is for one.
            least = gradients.least_memory(
                model, loss, self._rows(x[:2], ids[:2], slice(0, 1)), self.proj_dim, self.kind
            )
            count = max(1, min(count, memory // 2 // least))
        count = -(-len(times) // -(-len(times) // count))  # equal passes
        total = None
        for start in range(0, len(times), count):
            batch = self._rows(x, ids, slice(start, start + count))
            if self.normalize:
                batch["weights"] = _inverse_norms(model, loss, batch, memory)
            part = gradients.project_gradients(
                model, loss, batch, self.proj_dim, kind=self.kind, seed=self.seed, memory=memory
            )
            part *= batch["timesteps"].shape[1] / len(times)  # a mean over the rows of this pass
            total = part if total is None else total.add_(part)
        return total

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, images: Examples, ids: Tensor, *, timesteps_per_pass: int = 32) -> Tensor:
        """The training loss ``mean (e - eps)^2`` of a batch, averaged over the timesteps and the noise of its features.

        Args:
            model, images, ids, timesteps_per_pass: see :meth:`batch`.

        Returns:
            [B] float64 on the CPU.

        Extra memory: the images with their noise once for each row of a pass, and a forward pass of them.
        """
        x, times = self._views(model, images), self._times()
        total = torch.zeros(len(x), dtype=torch.float64)
        for start in range(0, len(times), timesteps_per_pass):
            batch = self._rows(x, ids, slice(start, start + timesteps_per_pass))
            values = _values(model, batch, loss=as_loss("simple"), schedule=self.schedule)
            total += values.double().sum(1).cpu()
        return total / len(times)

    def _function(self):
        """f, called as a :class:`~pyattr.diffusion.Loss` is."""
        return self.loss

    def _views(self, model: nn.Module, images: Examples) -> Examples:  # -> [B, 1 or R, C, H, W]
        images, conditions = separate(images)
        x = to_unit(images, reference_parameter(model, "features"))
        return with_conditions(x[:, None] if x.dim() == 4 else x.repeat_interleave(self.num_noises, 1), conditions)

    def _times(self) -> Tensor:  # [R], R = K * num_noises
        return self.timesteps().repeat_interleave(self.num_noises)

    def _draws(self) -> Tensor:  # [R]
        return torch.arange(self.num_noises).repeat(self.num_timesteps)

    def _rows(self, x: Examples, ids: Tensor, which: slice) -> dict[str, Tensor]:
        """What some of the R rows of images are made of; "noise" is what f compares the prediction with."""
        x, conditions = separate(x)
        t, draw = self._times()[which], self._draws()[which]
        x = x if x.shape[1] == 1 else x[:, which]
        eps = noise(x.shape[2:], seed=self.noise_seed, ids=ids[:, None], timesteps=t, draws=draw).to(x)
        t = t.to(x.device).expand(len(x), -1)  # [B, R']
        told = {} if conditions is None else {"conditions": conditions.to(x.device)[:, None].expand(t.shape)}
        return {"noisy": self.schedule.add_noise(x, eps, t), "noise": eps, "timesteps": t, **told}


def _values(model, batch, *, loss: Loss, schedule: Schedule) -> Tensor:  # -> [B, R]
    noisy, eps, times = batch["noisy"], batch["noise"], batch["timesteps"]  # [B, R, C, H, W] twice, [B, R]
    flat = times.flatten()
    told = (batch["conditions"].flatten(),) if "conditions" in batch else ()
    prediction = predict_noise(model, noisy.flatten(0, 1), flat, *told)
    values = loss(prediction, eps.flatten(0, 1), flat, schedule).unflatten(0, times.shape)
    return values * batch["weights"] if "weights" in batch else values


def _inverse_norms(model, loss, batch: dict[str, Tensor], memory: int) -> Tensor:
    """One over the norm of each row's gradient, and 0 where it is zero: [B, R], as each row weighs in the sum."""
    each = {name: tensor.flatten(0, 1)[:, None] for name, tensor in batch.items()}  # a row as a sample of its own
    norms = gradients.gradient_norms(model, loss, each, memory=memory).unflatten(0, batch["timesteps"].shape)
    return torch.where(norms == 0, norms, 1 / norms).to(batch["noisy"])


def compute(
    model: nn.Module,
    images,
    feature_map: FeatureMap,
    *,
    ids=None,
    batch_size: int = 16,
    timesteps_per_pass: int = 32,
    memory: int = MEMORY,
    directory: str | os.PathLike | None = None,
    shard_rows: int = 256,
    progress: Progress = silent,
    stage: str = "features",
) -> Features:
    """Features of many images, kept on disk as they are made when a directory is given.

    An interrupted call that is made again goes on from the last shard it wrote; shards that were deleted are made again. The
    result does not depend on ``batch_size``, ``timesteps_per_pass``, ``memory``, ``shard_rows`` or the interruption but for
    rounding, and not at all where these four are the same, on the same machine and thread count, as long as no
    layer loses its rule on the way, which a FallbackWarning tells. (Batches end where a shard
    ends, without a directory too; a directory that exists keeps its own ``shard_rows``.)

    Args:
        model: predicts the noise; evaluated in eval mode and left in its own.
        images: [N, C, H, W] uint8, or floating point in [-1, 1]; or :class:`~pyattr.diffusion.Conditioned`.
        ids: [N] distinct integers in [0, 2^63) that the noise is a function of; 0..N-1 if None.
        batch_size: images whose gradients are taken together.
        timesteps_per_pass, memory: see :meth:`FeatureMap.batch`.
        directory: where shards go; None keeps the features in memory.
        shard_rows: rows in a shard: what an interruption may lose.
        progress, stage: counts images.

    Returns:
        :class:`Features`.

    Raises:
        TypeError, ValueError: an argument is not as above, or the directory was made with another model, other images or
            another feature map; the message says what differs. Or ``memory`` is too small.
        DamagedFileError: the directory's manifest cannot be read, or a shard in it is damaged.

    Extra memory: that of :meth:`FeatureMap.batch`, and one shard twice or all features twice.
    """
    images = as_examples(images, "features", "images")
    check_conditions(model, images, "features", "images")
    if len(images) == 0:
        raise ValueError("features: images must hold at least one image, got none")
    for name, value in (
        ("batch_size", batch_size),
        ("timesteps_per_pass", timesteps_per_pass),
        ("shard_rows", shard_rows),
        ("memory", memory),
    ):
        if value < 1:
            raise ValueError(f"features: {name} must be at least 1, got {value}")
    ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if ids.shape != images.shape[:1] or len(ids.unique()) != len(ids):
        raise ValueError(f"features: ids must be {len(images)} distinct integers, got shape {list(ids.shape)}")
    total, done = len(images), 0

    def rows(start: int, end: int) -> Tensor:  # -> [end - start, D]
        nonlocal done
        parts = []
        for first in range(start, end, batch_size):
            which = slice(first, min(first + batch_size, end))
            part = feature_map.batch(
                model, images[which], ids[which], timesteps_per_pass=timesteps_per_pass, memory=memory
            )
            parts.append(part.cpu())
            done += len(part)
            progress(done, total, stage)
        return torch.cat(parts)

    with evaluating(model):
        if directory is None:
            progress(0, total, stage)
            shards = [rows(start, min(start + shard_rows, total)) for start in range(0, total, shard_rows)]
            return Features.from_tensor(torch.cat(shards), ids)
        store = FeatureDirectory(
            directory,
            settings={
                **feature_map.settings(),
                **identity(model),
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            },
            data={"images and ids": tensors_hash({**contents(images), "ids": ids})},
            rows=total,
            shard_rows=shard_rows,
        )
        todo = store.missing()
        done = total - sum(end - start for start, end in todo)
        progress(done, total, stage)
        for start, end in todo:
            store.write(start, rows(start, end), ids[start:end], batch_size)
        return store.features()
