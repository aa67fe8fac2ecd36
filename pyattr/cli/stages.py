"""The stages of the work, each bound to its place in an output folder: training and generating, and what they share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .. import attribution, diffusion
from ..datasets import DataError, ImageDataset, load
from ..diffusion.checkpoint import build, trained_with
from ..diffusion.sampling import check_options as check_sampling
from ..diffusion.sampling import num_noises
from ..diffusion.storage import data_hash, load_record
from ..diffusion.train import check_options as check_training
from ..files import whole_file
from ..report import Timing
from .display import Display
from .options import DataOptions, KeepOptions, SampleOptions, TrainOptions
from .workspace import Stage, Workspace, WorkspaceError, named_file

SCHEDULE = diffusion.Schedule()  # of every model made here
NEWEST = KeepOptions()


def load_data(options: DataOptions) -> ImageDataset:
    """The images that the options name."""
    data = load(options.source, size=options.size, root=options.root)
    return data if options.limit is None else data.spread(options.limit)


class Step:
    """One line of the plan: a stage, what to call it, and what it will cost.

    Args:
        title: its name, for people.
        detail: what it does, for people.
        stage: where its results lie.
        size: bytes that it will write, about.
    """

    def __init__(self, title: str, detail: str, stage: Stage, size: int):
        self.title, self.detail, self.stage, self.size = title, detail, stage, size
        self.reused = stage.finished

    @property
    def status(self) -> str:
        """found, partly done, or to do."""
        if self.stage.finished:
            return "found"
        return "partly done" if self.stage.begun else "to do"

    def working(self) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """:meth:`Stage.work`, unless the stage is finished and its results need only be read."""
        return contextlib.nullcontext({}) if self.stage.finished else self.stage.work()

    def timing(self) -> Timing:
        """The time that the finished stage took."""
        record = self.stage.record
        notes = [f"in {record['runs']} runs"] if record["runs"] > 1 else []
        if self.reused:
            notes.append("from an earlier run")
        return Timing(self.title, record["seconds"], ", ".join(notes))


def check_fits(network: str, shape: tuple[int, int, int]) -> None:
    """Refuse images that a preset cannot halve often enough.

    Raises:
        WorkspaceError: what size would do.
    """
    _, height, width = shape
    divisor = diffusion.PRESETS[network].divisor if network in diffusion.PRESETS else 1
    if height != width or height % divisor:
        fitting = max(divisor, min(height, width) // divisor * divisor)
        raise WorkspaceError(
            f"the network {network} needs square images whose side is a multiple of {divisor}, "
            f"got {height}x{width}: give --size {fitting}"
        )


def write_images(folder: Path, samples: diffusion.Samples) -> None:
    """Each image as a PNG named by its id, where it does not lie there yet."""
    for number, pixels in zip(samples.ids.tolist(), samples.uint8().numpy(), strict=True):
        path = folder / f"image-{number:05d}.png"
        if path.exists():
            continue
        with whole_file(path) as stream:
            picture = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
            Image.fromarray(picture).save(stream, "PNG")


class Training(Step):
    """Trains a model on the data, or finds it trained.

    Raises:
        WorkspaceError, ValueError, ImportError: the network does not fit the images, or cannot be built.
    """

    def __init__(self, workspace: Workspace, data: ImageDataset, options: TrainOptions, keep: KeepOptions = NEWEST):
        self.data, self.options, self.keep = data, options, keep
        check_fits(options.network, data.shape)
        check_training(**{name: value for name, value in self._options().items() if name != "flip"})
        with torch.device("meta"):  # only to count, and to fail before the work
            self.parameters = sum(p.numel() for p in self._network().parameters())
        settings = {"data": data.fingerprint(), "schedule": dataclasses.asdict(SCHEDULE), **dataclasses.asdict(options)}
        if keep != NEWEST:  # the model is the same, but not what else lies in its folder
            settings["checkpoints"] = dataclasses.asdict(keep)
        made = -(-options.steps // (keep.every or -(-options.steps // 20)))
        super().__init__(
            "Training",
            f"{options.network} ({self.parameters:,} parameters), {options.steps:,} steps of {options.batch_size} images",
            workspace.stage("train", settings),
            # Weights, two moments and perhaps an average, in each checkpoint, the state since, and the one being written.
            4 * self.parameters * (3 if options.ema is None else 4) * (min(keep.count, made) + 2),
        )

    def _options(self) -> dict[str, Any]:
        """Those of :func:`pyattr.diffusion.train`."""
        options = {
            name: v for name, v in dataclasses.asdict(self.options).items() if name not in ("network", "dropout")
        }
        return {**options, "checkpoint_every": self.keep.every, "keep_checkpoints": self.keep.count}

    def _network(self) -> nn.Module:
        options, (channels, size, _) = self.options, self.data.shape
        return diffusion.unet(options.network, channels=channels, size=size, dropout=options.dropout)

    def run(self, display: Display, device: torch.device) -> nn.Module:
        """The trained model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            model = self._network().to(device)
        with self.working() as notes:
            outcome = diffusion.train(
                model,
                torch.from_numpy(self.data.images),
                schedule=SCHEDULE,
                checkpoint_directory=self.stage.folder,
                progress=display.progress,
                **self._options(),
            )
            notes["parameters"] = self.parameters
            # Two hundred means are enough to draw the curve.
            notes["losses"] = [float(part.mean()) for part in np.array_split(outcome.losses.numpy(), 200) if len(part)]
        return outcome.model


class Checkpoint:
    """A model that lies in a file or a folder of checkpoints.

    Args:
        path: the file or folder.
        key: what tells this model from others; by default a hash of the file.
        named: whether the user named it, see :func:`~pyattr.cli.workspace.named_file`.

    Attributes:
        file: the checkpoint itself, the newest of a folder.
        schedule: the one that the model was trained with.

    Raises:
        WorkspaceError: there is none, or it does not say how its model was trained.
        DamagedFileError, ValueError: it is not a model's.
    """

    def __init__(self, path: str | os.PathLike, key: str | None = None, *, named: bool = False):
        self.path, self._named = Path(path), named
        found = diffusion.checkpoints(self.path) if self.path.is_dir() else {0: self.path}
        self.file = found[max(found)] if found else self.path
        if not self.file.is_file():
            raise WorkspaceError(
                f"no checkpoint at {self.path}: give a file or folder that `pyattr train` wrote, or train a model first"
            )
        with self._reading():
            self.schedule, self._images = trained_with(self.file)
        if self.schedule is None:
            raise WorkspaceError(
                f"{self.file} does not say with which noise schedule its model was trained: "
                "write it again by pyattr.diffusion.save_model(path, model, schedule=...)"
            )
        self.key = key or sha256(self.file)
        self._record = load_record(self.file)

    @property
    def training(self) -> dict[str, str | int]:
        """Of a checkpoint of a training its "step", and what tells this "training" from others; nothing of other files."""
        if "step" not in self._record:
            return {}
        told = json.dumps(self._record["settings"], sort_keys=True)
        return {"step": self._record["step"], "training": hashlib.sha256(told.encode()).hexdigest()}

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Of the images that the model takes; None where the file does not say how its network is built."""
        if self._record["model"] is None:
            return None
        with torch.device("meta"):
            return image_shape(build(self._record["model"]))

    def trained_on(self, data: ImageDataset) -> bool | None:
        """Whether the model was trained on just these images; None when the file does not say."""
        return None if self._images is None else self._images == data_hash(torch.from_numpy(data.images))

    def run(self, device: torch.device) -> nn.Module:
        """The model."""
        with self._reading():
            return diffusion.load_model(self.file).to(device)

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        wanted = "--checkpoint must be a file or folder that `pyattr train` wrote"
        return named_file(self.file, wanted) if self._named else contextlib.nullcontext()

    def history(self) -> dict[int, Checkpoint]:
        """The checkpoints of this model's training up to itself by their steps, rising; as many as were kept.

        Raises:
            WorkspaceError: one lies there that was trained with another noise schedule.
        """
        found = diffusion.checkpoints(self.file.parent)
        own = next((step for step, path in found.items() if path.name == self.file.name), None)
        if own is None:
            return {0: self}
        history = {step: Checkpoint(path, named=self._named) for step, path in found.items() if step < own} | {
            own: self
        }
        for checkpoint in history.values():
            if checkpoint.schedule != self.schedule:
                raise WorkspaceError(
                    f"{checkpoint.file} is not of the training of {self.file}: its noise schedule is another"
                )
        return history


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Of the images that a model takes."""
    size = model.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return model.config["in_channels"], height, width


class Sampling(Step):
    """Generates images from a model, or finds them generated.

    Raises:
        ValueError: an option is not possible.
    """

    def __init__(
        self,
        workspace: Workspace,
        model_key: str,
        shape: tuple[int, int, int],
        options: SampleOptions,
        schedule: diffusion.Schedule = SCHEDULE,
    ):
        self.options, self.shape, self.schedule = options, shape, schedule
        chosen = dataclasses.asdict(options)
        trajectory = chosen.pop("trajectory")
        check_sampling(schedule, **{name: value for name, value in chosen.items() if name != "num_images"})
        settings = {
            "model": model_key,
            "shape": shape,
            "schedule": dataclasses.asdict(schedule),
            **chosen,
            **({"trajectory": True} if trajectory else {}),  # the images are the same, but not what else is kept
        }
        numbers = options.num_images * int(np.prod(shape))
        noises = num_noises(options.method, options.steps, options.eta)
        super().__init__(
            "Generating",
            f"{options.num_images} images by {options.method.upper()} in {options.steps} steps",
            workspace.stage("generate", settings),
            2 * 4 * numbers * (1 + noises + (options.steps + 1 if trajectory else 0)),
        )

    def run(self, model: nn.Module, display: Display) -> diffusion.Samples:
        """The samples; each image also lies in the stage's folder as a PNG."""
        options = dataclasses.asdict(self.options)
        record = "trajectory" if options.pop("trajectory") else "noise"
        with self.working():
            samples = diffusion.sample(
                model,
                self.schedule,
                shape=self.shape,
                directory=self.stage.folder,
                record=record,
                progress=display.progress,
                **options,
            )
            write_images(self.stage.folder, samples)
        return samples


@dataclass(frozen=True)
class Queries:
    """The images to attribute.

    Args:
        images: [Q, C, H, W] uint8.
        ids: [Q] int64, the noise ids; None: the method's own.
        names: Q, for people.
        key: what tells these queries from others.
        generated: whether a model made them.
        samples: what generated images were made from.
        examples: as the model takes them, where that is not the images.
    """

    images: np.ndarray
    ids: torch.Tensor | None
    names: tuple[str, ...]
    key: str
    generated: bool
    samples: diffusion.Samples | None = None
    examples: diffusion.Conditioned | None = None

    @property
    def asked(self) -> torch.Tensor | diffusion.Conditioned:
        """What methods that ask the model are given."""
        return torch.from_numpy(self.images) if self.examples is None else self.examples


def queries_of_samples(samples: diffusion.Samples, key: str) -> Queries:
    """Generated images as 8-bit files would hold them."""
    images = samples.uint8().numpy()
    names = tuple(f"Generated image {number}" for number in samples.ids.tolist())
    return Queries(images, attribution.QUERY_IDS + samples.ids, names, key, True, samples)


def queries_of_data(data: ImageDataset, train: ImageDataset) -> Queries:
    """Images that the user gave.

    Raises:
        DataError: they are not of the shape of the training images.
    """
    if data.shape != train.shape:
        (channels, *size), (wanted, height, width) = data.shape, train.shape
        fits = channels == wanted and size != [height, width] and height == width
        raise DataError(
            f"data: queries are {shape_text(data.shape)} and training images {shape_text(train.shape)}: "
            + (f"give --size {height}, or queries" if fits else "give queries")
            + " of the same size and channels"
        )
    return Queries(data.images, None, data.ids, data.fingerprint(), False)


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file, whole or not at all."""
    with whole_file(path) as stream:
        np.savez(stream, **arrays)


def read_npz(path: Path, wanted: Container[str] | None = None, *, remedy: str | None = None) -> dict[str, np.ndarray]:
    """Read a file of :func:`write_npz`, or those of some arrays that it has; the archive's own checksums are verified.

    Args:
        remedy: what to do about a damaged file; None: it lies in a stage's folder, which is to be deleted.

    Raises:
        WorkspaceError: it is missing or damaged.
    """
    try:
        # np.load leaves a file open that it opened itself and found to be no archive.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if wanted is None or name in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        remedy = remedy or f"delete the folder {path.parent} and run again"
        raise WorkspaceError(f"{path} is damaged or missing: {remedy}") from error


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shape_text(shape: tuple[int, ...]) -> str:
    """1×28×28."""
    return "×".join(map(str, shape))
