"""What an encoded ensemble makes of samples: counterfactuals, and the two baselines for guessing them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.images import evaluating, predict_noise
from ..diffusion.progress import Progress
from ..diffusion.sampling import HELD, Sampler, Samples
from ..diffusion.schedule import Schedule, as_schedule
from ..diffusion.storage import DamagedFileError, differences, load_tensors, save_tensors, tensors_hash
from .encoded_members import Mixture

METHODS = ("jacobian", "last_step", "members")
DDIM_STEPS = 50


def default_steps(method: str, schedule: Schedule) -> int:
    """How many steps a sampler takes where nobody says: T, or for "ddim" the smaller of T and 50."""
    return min(schedule.num_timesteps, DDIM_STEPS) if method == "ddim" else schedule.num_timesteps


def combine(weights: Tensor, columns: Tensor) -> Tensor:  # [M, n], [n, D] -> [M, D]
    """Weighted sums of rows; one of weight 0 has no part in a sum, even where it is NaN or infinite."""
    finite = columns.isfinite().all(1, keepdim=True)  # [n, 1]
    out = weights @ torch.where(finite, columns, 0)
    for i in (~finite[:, 0]).nonzero()[:, 0].tolist():
        weight = weights[:, i : i + 1]
        out += torch.where(weight == 0, 0, weight * columns[i])
    return out


class Replay:
    """Samples and the ensemble that made them, to be made again with other weights and the same noise.

    Args:
        members: n networks.
        weights: v, [n] float64, of the ensemble that made the samples.
        samples: Q of them.
        batch_size: images that go through a network together.
        directory: where batches are kept as they are done; None keeps nothing.
        progress: its stages are the kinds of results, counted in steps of images.
    """

    def __init__(
        self,
        members: list[nn.Module],
        weights: Tensor,
        samples: Samples,
        batch_size: int,
        directory: Path | None,
        progress: Progress,
    ):
        self.members, self.weights, self.samples = members, weights, samples
        self.batch_size, self.directory, self.progress = batch_size, directory, progress
        self.mixture = Mixture(members, weights)
        self.key = tensors_hash({"images": samples.images, "ids": samples.ids, "noise": samples.noise})
        self.sampler = self.with_model(self.mixture)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def with_model(self, model: nn.Module, settings: dict | None = None) -> Sampler:
        """The samples' own sampler with another model; ``settings`` hold theirs and say what else its states are known by."""
        made = self.samples.settings if settings is None else settings
        return Sampler(model, as_schedule(made["schedule"]), self.samples.timesteps, made)

    def batches(
        self,
        kind: str,
        count: int,
        steps: int,
        settings: dict,
        make: Callable[[slice, dict, Path | None, Callable[[int], None]], Tensor],
    ) -> Iterator[tuple[slice, Tensor]]:
        """Results a batch at a time, from the directory where it has them.

        Args:
            kind: the name of the files and of the stage of progress.
            count: how many results.
            steps: of progress in each.
            settings: that decide the results, beside the samples.
            make: of rows, the settings, the file for an unfinished batch, and what to tell of steps done in it.
        """
        settings = {
            "kind": kind,
            "samples": self.key,
            **self.samples.settings,
            "batch_size": self.batch_size,
            **settings,
        }
        with evaluating(self.mixture):
            for start in range(0, count, self.batch_size):
                rows = slice(start, min(start + self.batch_size, count))
                path = unfinished = None
                if self.directory is not None:
                    path, unfinished = (
                        self.directory / f"{name}-{start:08d}.safetensors" for name in (kind, f"{kind}-unfinished")
                    )
                found = path is not None and path.exists()
                if found:
                    tensors, made = load_tensors(path)
                    self._check(made, settings)
                    result = tensors["result"]
                else:
                    result = make(
                        rows,
                        settings,
                        unfinished,
                        lambda done, before=start: self.progress(before * steps + done, count * steps, kind),
                    )
                    if path is not None:
                        save_tensors(path, {"result": result}, settings)
                if unfinished is not None:
                    unfinished.unlink(missing_ok=True)
                yield rows, result
                if not found or rows.stop == count:
                    self.progress(rows.stop * steps, count * steps, kind)

    def _check(self, made: dict, asked: dict) -> None:
        differ = differences(made, asked)
        if differ:
            raise ValueError(
                f"EncodedEnsemble: directory {self.directory} holds results made otherwise: {differ}; use another directory"
            )

    def state(self, path: Path | None, settings: dict) -> tuple[dict[str, Tensor], int] | None:
        """The tensors of an unfinished batch and how many steps are done; None where there is none that can be read."""
        if path is None:
            return None
        try:
            tensors, record = load_tensors(path)
        except (FileNotFoundError, DamagedFileError):
            return None  # the batch is made from its beginning, and the file replaced
        self._check(record["settings"], settings)
        return tensors, record["steps"]

    def reweighted(self, weights: Tensor, kind: str) -> Tensor:  # [M, n] -> [Q, M, C, H, W]
        """The samples again, once for each row of weights."""
        queries, rows = len(self.samples), len(weights)
        out = torch.empty(queries * rows, *self.samples.images.shape[1:], **HELD)
        steps = len(self.sampler.steps)

        def make(batch: slice, settings: dict, unfinished: Path | None, count) -> Tensor:
            pairs = torch.arange(batch.start, batch.stop)
            sampler = self.with_model(Mixture(self.members, weights[pairs % rows]), settings)
            return sampler.walk(self.samples.noise, pairs // rows, pairs, unfinished, count)

        settings = {"other weights": tensors_hash({"weights": weights})}
        for batch, images in self.batches(kind, queries * rows, steps, settings, make):
            out[batch] = images
        return out.view(queries, rows, *out.shape[1:])

    def last_steps(self, weights: Tensor) -> Tensor:  # [M, n] -> [Q, M, C, H, W]
        """The samples with other weights at the last step alone: what the paper calls last step predicted noise."""
        number = len(self.sampler.steps) - 1

        @torch.no_grad()
        def make(batch: slice, settings: dict, unfinished: Path | None, count) -> Tensor:
            ids = self.samples.ids[batch]
            sampler = self.with_model(self.mixture, settings)
            if self.samples.trajectory is None:
                x = sampler.walk(self.samples.noise[batch], slice(None), ids, unfinished, count, steps=number)
            else:
                x = self.samples.trajectory[batch, number]
            placed = sampler.place(x)
            times = sampler.times(number, len(x))
            predictions = [predict_noise(member, placed, times).float().cpu() for member in self.members]
            return torch.stack([x, *predictions], 1)  # [B, 1 + n, C, H, W]

        out = torch.empty(len(self.samples), len(weights), *self.samples.images.shape[1:], **HELD)
        for batch, result in self.batches("last_step", len(self.samples), number + 1, {}, make):
            for image, made in zip(out[batch], result, strict=True):
                x, predictions = made[:1].double(), made[1:].double()
                e = combine(weights, predictions.flatten(1)).view(image.shape)
                image.copy_(self.sampler.steps[number].apply(x, e))
        return out
